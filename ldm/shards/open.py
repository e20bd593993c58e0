"""Opening a set of local pre-encoded shards: the one way for all that read any, with one line for each thing wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.shards.index import AUTOENCODER, ENCODERS, FAMILY, INDEX, MEMBERS, check_against_index, read_index
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CONTEXT, LATENT, MAPS, POOLED, TEACHER_KEYS, is_array
from ldm.shards.urls import expand_urls, is_stream, names_all_there
from ldm.shards.verify import verify_shards
from ldm.util import UserError

_SAME_FAMILY = "encode the images with the release that is trained, or train with the config of that family"
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
    """The samples of the shards that `urls` names, as in `expand_urls`; the keys are those of `ShardDataset`.

    The shards are held against the index beside them, where there is one, before any is looked into.

    Args:
        verify: read each new shard once as a whole, against its checksum in the index.
        unfinished: of a set that is not finished take what is there, and only warn: for whoever looks at one.

    Raises:
        UserError: nothing matches, a shard is streamed, missing, damaged or not that of its index, the set is
            unfinished, or its samples do not fit together; names the file, and says what to do.
    """
    paths = expand_urls(urls)
    stream = next(filter(is_stream, paths), None)
    if stream is not None:
        raise UserError(f"{stream}: is streamed; give local shards, which can be read in any order")
    check_against_index(paths, whole=names_all_there(urls), unfinished=unfinished)
    check_members(paths, [key for key in (first_stage_key, cond_stage_key, *extra) if key is not None])
    if verify:
        verify_shards(paths)
    return ShardDataset(paths, first_stage_key, cond_stage_key, extra)


def check_members(paths: Sequence[str | Path], keys: Sequence[str], *, for_training: bool = False) -> None:
    """Refuse a set whose samples, by its index, lack one of `keys`: it was made for another family of models.

    `for_training` refuses one with members that a model of another family trains without: `MAPS`, and `POOLED`
    where the stored encodings of captions are read.

    Raises:
        UserError: one of these; names the index, the family of the set, and the member.
    """
    for folder in dict.fromkeys(Path(path).parent for path in paths):
        index = read_index(folder) or {}
        members = index.get(MEMBERS)
        if members is None:
            continue
        asked = [key for key in keys if is_array(key) and key not in TEACHER_KEYS]
        lacking = next((key for key in asked if key not in members), None)
        others = [member for member in members if member in (*MAPS, *([POOLED] if CONTEXT in keys else ()))]
        unread = next((member for member in others if member not in keys), None) if for_training else None
        if lacking or unread:
            what = f"have no {lacking}, which the model reads" if lacking else f"have {unread}, which the model ignores"
            raise UserError(
                f"{folder / INDEX}: the set is for {family_name(index)}: its samples {what}; {_SAME_FAMILY}"
            )


def family_name(index: Mapping[str, Any]) -> str:
    """Return the family of a set in words."""
    return f"the family {index[FAMILY]}" if index.get(FAMILY) else "a model of no known family"


def check_encoders(
    dataset: ShardDataset, own: Mapping[str, str | None], whose: str, advice: str = _SAME_RELEASE
) -> None:
    """Refuse a set that was made by other encoders than those of `whose`, which have the digests `own`.

    The keys of `own` are those of `ENCODERS`, as in an index. Text towers count where stored encodings are read, not
    where captions are. What has no digest, here or there, is not compared.

    Raises:
        UserError: the set was made by another one; names its index, and ends in `advice`.
    """
    for folder in dict.fromkeys(path.parent for path in dataset.paths):
        index = read_index(folder) or {}
        for key, what in ENCODERS.items():
            made_by, ours = index.get(key), own.get(key)
            if None in (made_by, ours) or made_by == ours or (key != AUTOENCODER and not dataset.reads_encodings):
                continue
            raise UserError(
                f"{folder / INDEX}: the set was made by another {what} ({made_by:.12}…) than that of {whose} "
                f"({ours:.12}…); {advice}"
            )
