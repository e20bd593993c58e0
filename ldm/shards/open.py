"""Opening of a set of pre-encoded shards that can be read in any order, with all checks."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.modules.encoders.caption_settings import CHUNK, CaptionSettings
from ldm.remote.copies import LIMIT, cache_limit, state_of
from ldm.remote.path import ShardPath, as_path, is_remote
from ldm.shards.index import (
    AUTOENCODER,
    ENCODERS,
    FAMILY,
    INDEX,
    MEMBERS,
    SEVERAL_CAPTIONS,
    USED_PARTS,
    NotAnIndex,
    check_against_index,
    read_index,
)
from ldm.shards.members import NEEDS_LOSS_MASKS
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CONTEXT, LATENT, LOSS_MASK, MAPS, POOLED, TEACHER_KEYS, TEXT_ENCODINGS, is_array, plain
from ldm.shards.urls import expand_urls, is_stream, names_all_there
from ldm.shards.verify import verify_shards
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

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
    remote: bool = False,
) -> ShardDataset:
    """Return the samples of the shards at `urls` (see `expand_urls`). The keys are as for `ShardDataset`.

    The shards are first compared with the index in their folder, if there is one.

    Args:
        verify: compare the checksum of each new shard with the index. This reads the whole shard once.
        unfinished: open an unfinished set with a warning, for inspection.
        remote: open sets on servers too, if they have an index. The caller has checked that their URLs are trusted.

    Raises:
        UserError: nothing matches; a shard is streamed, missing, damaged or not that of the index; the set is
            unfinished; or its samples have different shapes or keys.
    """
    names = expand_urls(urls)
    stream = next((name for name in names if is_stream(name) and not (remote and is_remote(name))), None)
    refuse_if(stream is not None, f"{stream}: is a stream; give local shards, which can be read in any order")
    paths = list(map(as_path, names))
    if streamed(names) is not None:
        raise UserError(f"{paths[0].parent}: cannot be read in any order, which is needed here; copy the set")
    check_against_index(paths, whole=names_all_there(urls), unfinished=unfinished)
    check_members(paths, [key for key in (first_stage_key, cond_stage_key, *extra) if key is not None])
    if verify:
        verify_shards(paths)
    dataset = ShardDataset(paths, first_stage_key, cond_stage_key, extra)
    if not any(key in TEXT_ENCODINGS for key in dataset.keys):
        folders = {path.parent for path in paths}
        dataset.has_several_captions |= any((read_index(folder) or {}).get(SEVERAL_CAPTIONS) for folder in folders)
    return dataset


def streamed(names: Iterable[str]) -> str | None:
    """Return the first of the shards `names` that can only be streamed, or None. Log a warning for a set on a server.

    Sets on servers can be read in any order if they have an index, and the server gives parts of files or the cache
    holds the set.
    """
    folders: dict[ShardPath, list[str]] = {}
    for name in filter(is_stream, names):
        if not is_remote(name):
            return name
        folders.setdefault(as_path(name).parent, []).append(name)
    for folder, shards in folders.items():
        reason = _why_streamed(folder, shards)
        if reason is not None:
            logger.warning("%s: %s; the set is streamed, and a resumed run restarts its epoch", folder, reason)
            return shards[0]
    return None


def _why_streamed(folder: ShardPath, shards: Sequence[str]) -> str | None:
    try:
        index = read_index(folder)
    except NotAnIndex:  # some servers have a page for every name
        return f"its {INDEX} is not the index of a set"
    if index is None:
        return f"has no {INDEX}"
    paths = list(map(as_path, shards))
    sizes = {entry["name"]: entry.get("bytes", 0) for entry in index["shards"]}
    size, limit = sum(sizes.get(path.name, 0) for path in paths), cache_limit()
    if size > limit and not state_of(paths[0], again=True).has_parts:
        return (
            f"the server gives whole files only (no Range), {size / 1e9:.1f} GB in all, more than the cache holds; set "
            f"{LIMIT} above that to read them in any order"
        )
    return None


def check_members(paths: Sequence[str | ShardPath], keys: Sequence[str], *, for_training: bool = False) -> None:
    """Check that the samples of a set, by its index, have the members `keys`.

    With `for_training`, the set must also have no members of another model family: `MAPS`, and `POOLED` if stored
    caption encodings are read.

    Raises:
        UserError: a member is missing or superfluous. The message names the index, the family and the member.
    """
    for folder in dict.fromkeys(as_path(path).parent for path in paths):
        index = read_index(folder) or {}
        members = index.get(MEMBERS)
        if members is None:
            continue
        asked = [key for key in keys if is_array(key) and key not in TEACHER_KEYS]
        lacking = next((key for key in asked if key not in members), None)
        others = [member for member in members if member in (*MAPS, *([POOLED] if CONTEXT in keys else ()))]
        unread = next((member for member in others if member not in keys), None) if for_training else None
        refuse_if(lacking == LOSS_MASK, f"{folder / INDEX}: the samples have no {LOSS_MASK}; {NEEDS_LOSS_MASKS}")
        if lacking or unread:
            what = f"have no {lacking}, which the model reads" if lacking else f"have {unread}, which the model ignores"
            raise UserError(
                f"{folder / INDEX}: the set is for {family_name(index)}: its samples {what}; {_SAME_FAMILY}"
            )


def say_unread_masks(dataset: ShardDataset) -> None:
    """Log that a set, by its index, has loss masks, for a loss that does not read them."""
    folders = dict.fromkeys(path.parent for path in dataset.paths)
    folder = next((folder for folder in folders if LOSS_MASK in (read_index(folder) or {}).get(MEMBERS, ())), None)
    if folder is not None:
        logger.info("%s: the loss masks are not used; a loss_config with the class Masked would use them", folder)


def describe_shapes(dataset: Any) -> str:
    """Return shapes and dtypes for a log line, such as `", f8 8x64x64 float16, t5 77x768 float16"`.

    Of a member that samples have several times, the number stands before: `"4 mask 1x64x64 float16"`.
    """
    counts = Counter(map(plain, dataset.keys))
    parts = []
    for key, found in dataset.shapes.items():
        name = f"{counts[key]} {key}" if counts[key] > 1 else key
        parts += [
            f", {name} {'x'.join(map(str, shape))} {dtype}" for shape, dtype in found.items() if plain(key) == key
        ]
    return "".join(parts)


def for_family(dataset: Any) -> str:
    """Return the end of a message that names the model family of a set, if its index has it. A stream has no index."""
    index = read_index(dataset.paths[0].parent) if isinstance(dataset, ShardDataset) else None
    return f"; the set is for {family_name(index)}" if index and index.get(FAMILY) else ""


def family_name(index: Mapping[str, Any]) -> str:
    """Return the model family of a set for messages."""
    return f"the family {index[FAMILY]}" if index.get(FAMILY) else "a model of no known family"


def warn_of_scale(dataset: ShardDataset, own: float) -> None:
    """Warn if a set was made for a model with another `scale_factor` than `own`. Its latents are unscaled."""
    for folder in dict.fromkeys(path.parent for path in dataset.paths):
        index = read_index(folder) or {}
        made_for = index.get("scale_factor")
        if made_for is not None and not math.isclose(made_for, own, rel_tol=1e-3):
            logger.warning(
                "%s: the set is for %s with scale_factor %g, but the model has %g; set model.params.scale_factor=%g, "
                "unless the model is trained from random weights",
                folder / INDEX, family_name(index), made_for, own, made_for,
            )  # fmt: skip


def common_caption_settings(datasets: Iterable[Any], read: bool = True) -> CaptionSettings | None:
    """Return the settings that the captions of all local sets among `datasets` were encoded with, or None without one.

    With `read`, sets whose encodings are not read are left out.

    Raises:
        UserError: two sets differ, or the samples of a set do not have the length in its index.
    """
    found: dict[Path, CaptionSettings] = {}
    for dataset in datasets:
        if not isinstance(dataset, ShardDataset) or (read and not dataset.reads_encodings):
            continue
        for folder in dict.fromkeys(path.parent for path in dataset.paths):
            found[folder] = settings = CaptionSettings.from_entries(read_index(folder) or {})
            tokens = settings.max_tokens // CHUNK * (CHUNK + 2)
            for shape in dataset.shapes.get(CONTEXT, ()):
                refuse_if(
                    settings.max_tokens != CHUNK and shape[0] != tokens,
                    f"{folder / INDEX}: max_tokens is {settings.max_tokens}, but the samples have {CONTEXT} of the "
                    f"shape {shape}; restore the file, or encode the images again",
                )
    first, ours = next(iter(found.items()), (None, None))
    for folder, settings in found.items():
        refuse_if(
            settings != ours,
            f"{folder / INDEX}: the captions were encoded with {settings}, but with {ours} in {first}/{INDEX}; "
            "encode both sets with the same --max-tokens and --clip-skip of tools/preencode.py",
        )
    return next(iter(found.values()), None)


def check_encoders(
    dataset: ShardDataset, own: Mapping[str, str | None], whose: str, advice: str = _SAME_RELEASE
) -> None:
    """Compare the encoders of a set with those of `whose`, which have the digests `own`.

    The keys of `own` are those of `ENCODERS` and `USED_PARTS`. If both know the digest of a used part, it takes the
    place of that of the whole. Missing digests are not compared. Text towers are compared only if the data set reads
    stored encodings.

    Raises:
        UserError: another encoder made the set. The message names the index and ends in `advice`.
    """
    for folder in dict.fromkeys(path.parent for path in dataset.paths):
        index = read_index(folder) or {}
        for key, what in ENCODERS.items():
            names = (USED_PARTS.get(key), key)
            known = [name for name in names if None not in (index.get(name), own.get(name))]
            if not known or index[known[0]] == own[known[0]] or (key != AUTOENCODER and not dataset.reads_encodings):
                continue
            told = next(name for name in reversed(known) if index[name] != own[name])  # the whole, as reports have it
            raise UserError(
                f"{folder / INDEX}: the set was made by another {what} ({index[told]:.12}…) than that of {whose} "
                f"({own[told]:.12}…); {advice}"
            )
