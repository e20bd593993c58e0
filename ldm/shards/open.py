"""Opening of a set of local pre-encoded shards, with all checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.shards.index import ENCODERS, INDEX, check_against_index, read_index
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CONTEXT, LATENT
from ldm.shards.urls import expand_urls, is_stream, names_all_there
from ldm.shards.verify import verify_shards
from ldm.util import UserError

_SAME_RELEASE = "encode the images again with the release that is used here, or use the release that made the set"


def open_shards(
    urls: str | Path | Sequence[str | Path],
    first_stage_key: str = LATENT,
    cond_stage_key: str | None = CONTEXT,
    extra: Sequence[str] = (),
    *,
    verify: bool = True,
    unfinished: bool = False,
) -> ShardDataset:
    """Return the samples of the shards at `urls` (see `expand_urls`). The keys are as for `ShardDataset`.

    The shards are first compared with the index in their folder, if there is one.

    Args:
        verify: compare the checksum of each new shard with the index. This reads the whole shard once.
        unfinished: open an unfinished set with a warning, for inspection.

    Raises:
        UserError: nothing matches; a shard is streamed, missing, damaged or not that of the index; the set is
            unfinished; or its samples have different shapes or keys.
    """
    paths = expand_urls(urls)
    stream = next(filter(is_stream, paths), None)
    if stream is not None:
        raise UserError(f"{stream}: is a stream; give local shards, which can be read in any order")
    check_against_index(paths, whole=names_all_there(urls), unfinished=unfinished)
    if verify:
        verify_shards(paths)
    return ShardDataset(paths, first_stage_key, cond_stage_key, extra)


def check_encoders(
    dataset: ShardDataset, own: Mapping[str, str | None], whose: str, advice: str = _SAME_RELEASE
) -> None:
    """Compare the encoders of a set with those of `whose`, which have the digests `own`.

    The keys of `own` are `autoencoder` and `text_tower`, as in an index. The text tower is compared only if the data
    set reads stored encodings. Missing digests are not compared.

    Raises:
        UserError: another encoder made the set. The message names the index and ends in `advice`.
    """
    for folder in dict.fromkeys(path.parent for path in dataset.paths):
        index = read_index(folder) or {}
        for key, what in ENCODERS.items():
            made_by, ours = index.get(key), own.get(key)
            if None in (made_by, ours) or made_by == ours or (key == "text_tower" and not dataset.reads_encodings):
                continue
            raise UserError(
                f"{folder / INDEX}: the set was made by another {what} ({made_by:.12}…) than that of {whose} "
                f"({ours:.12}…); {advice}"
            )
