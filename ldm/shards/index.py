"""Index of a set of shards, the file `index.json` in their folder.

Format 2 has the keys

    format, out, complete     2; the name pattern of the shards; false while shards are missing
    autoencoder, text_tower   digests of the weights that encoded the set; see `ldm.checkpoint.weights_digest`
    text_tower_2              digest of the second text tower, as in SDXL
    autoencoder_used          digest of the autoencoder's encoder, which alone makes samples
    text_tower_used           digest of the text tower without the last block, which SD 2 does not use
    scale_factor              scale factor of the model; stored latents are unscaled
    family                    key of the model family in `ldm.release.families`; null for an unknown one
    members                   names of the arrays of a sample, without the numbers of masks and without a teacher's
    empty_caption             encoding of the empty caption: `encoded`, or `zeros`
    shards                    name, samples, bytes and sha256 of each shard; repeats, if the images' folders have any:
                              pairs of repeats and the number of consecutive samples that have them
    samples                   total number
    teacher_power             power of the density of a teacher's timesteps; 0 if missing
    several_captions          true if each line of the text of a sample is a caption
    variants                  variants of the image of each sample, if there are several
    max_tokens, clip_skip     settings of the text encoder that differ from 75 and 1; see
                              `ldm.modules.encoders.caption_settings`

and the keys of `ldm.encoding.preencode`. Format 1 has no digests, and its shards may lack bytes and sha256. Missing
entries are not compared. The types of existing entries are checked, because users edit these files.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoint import USED_AUTOENCODER, USED_TOWER
from ldm.files import atomic_write, check_file, read_at_most
from ldm.modules.encoders.caption_settings import CHUNK, MOST_TOKENS
from ldm.remote.copies import look_at, state_of
from ldm.remote.path import RemotePath, ShardPath, as_path
from ldm.remote.retries import NotServed
from ldm.shards.spans import beside_shards
from ldm.shards.urls import MOST_REPEATS
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT_VERSION = 2
AUTOENCODER = "autoencoder"
# Keys of the digests of encoders, and names for messages.
ENCODERS = {AUTOENCODER: "autoencoder", "text_tower": "text tower", "text_tower_2": "second text tower"}
TEXT_TOWER = "text_tower"
# Keys of the digests of the parts of encoders that make samples. If known, they take the place of those of the whole.
USED_PARTS = {AUTOENCODER: USED_AUTOENCODER, TEXT_TOWER: USED_TOWER}
FAMILY, MEMBERS, EMPTY_CAPTION = "family", "members", "empty_caption"
REPEATS = "repeats"  # entry of a shard
SEVERAL_CAPTIONS = "several_captions"
MAX_TOKENS, CLIP_SKIP = "max_tokens", "clip_skip"
TEACHER_POWER = "teacher_power"
ZEROS, ENCODED = "zeros", "encoded"
MAKE_AGAIN = "write the set again with --overwrite, by tools/preencode.py or tools/make_prior.py"
_MEND = f"restore the value, or {MAKE_AGAIN}"
_MOST_BYTES = 1 << 28  # size limit of the file, enough for six million shards


class NotAnIndex(UserError):
    """A file with the name of an index is something else."""


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the index of the set in `folder`."""
    with atomic_write(folder / INDEX) as path:
        path.write_text(json.dumps(content, indent=1) + "\n")


def read_index(folder: ShardPath) -> dict[str, Any] | None:
    """Return the index of the set in `folder`, or None if there is no index.

    Raises:
        UserError: the file is not an index.
    """
    path = folder / INDEX
    try:
        index = json.loads(read_at_most(beside_shards(path), _MOST_BYTES))
    except (FileNotFoundError, NotServed):
        return None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise NotAnIndex(f"{path}: not JSON: {error}; {MAKE_AGAIN}") from error
    if not isinstance(index, dict) or "shards" not in index:
        raise NotAnIndex(f"{path}: lists no shards; {MAKE_AGAIN}, or remove the file if it is not the index of a set")
    version = index.get("format", 1)
    refuse_if(
        not (is_whole(version) and 1 <= version <= FORMAT_VERSION),
        f"{path}: has format {version!r:.80}, but this program reads 1 to {FORMAT_VERSION}; {MAKE_AGAIN}",
    )
    check_entries(f"{path}: ", index, _ENTRIES)
    for number, shard in enumerate(index["shards"]):
        where = f"{path}: shards[{number}]"
        is_entry = isinstance(shard, dict)
        needed = ("name",) if version == 1 else ("name", "bytes", "sha256")
        missing = next((key for key in needed if is_entry and key not in shard), None)
        if not is_entry:  # `refuse_if` would format each shard
            raise UserError(f"{where} is {shard!r:.80}, not the name, bytes and sha256 of a shard; {_MEND}")
        refuse_if(missing is not None, f"{where} has no {missing}; {_MEND}")
        check_entries(f"{where}: its ", shard, SHARD_ENTRIES)
    return index


def check_entries(where: str, found: Mapping[str, Any], entries: Mapping[str, Entry], mend: str = _MEND) -> None:
    """Raise `UserError` for the first of `entries` that is in `found` with a wrong value."""
    for key, (is_right, fault) in entries.items():
        if key in found and not is_right(found[key]):
            raise UserError(f"{where}{key} is {found[key]!r:.80}, {fault}; {mend}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def is_failures(value: Any) -> bool:
    """Return True for a list of images that could not be read, with name and reason."""
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "reason"))
        for entry in value
    )


def _is_name(name: Any) -> bool:
    """Return True for the name of a file in the index's folder."""
    if not isinstance(name, str) or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        return False
    return name.splitlines() == [name]  # messages have one line


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.isalnum()


def is_repeats(value: Any) -> bool:
    """Return True for a list of pairs: repeats, and the number of consecutive samples that have them."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_whole, pair)) and 1 <= pair[0] <= MOST_REPEATS
        for pair in value
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_key(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isidentifier())


Entry = tuple[Callable[[Any], bool], str]  # a check of a value, and the fault for messages
WHOLE: Entry = (is_whole, "not a whole number of at least 0")
_DIGEST: Entry = (is_digest, "not a digest")
FAILURES: Entry = (is_failures, "not a list of the name and the reason of images that could not be read")
_ENTRIES: dict[str, Entry] = {
    "shards": (lambda value: isinstance(value, list), "not a list"),
    "complete": (lambda value: isinstance(value, bool), "neither true nor false"),
    "samples": WHOLE,
    **dict.fromkeys(
        (*ENCODERS, *USED_PARTS.values()), (lambda value: value is None or is_digest(value), "not a digest")
    ),
    "scale_factor": (lambda value: _is_finite(value) and value > 0, "not a finite number above 0"),
    TEACHER_POWER: (lambda value: _is_finite(value) and value >= 0, "not a finite number of at least 0"),
    FAMILY: (_is_key, "not the key of a family of models"),
    MEMBERS: (_is_names, "not a list of names"),
    SEVERAL_CAPTIONS: (lambda value: isinstance(value, bool), "neither true nor false"),
    MAX_TOKENS: (
        lambda value: is_whole(value) and 0 < value <= MOST_TOKENS and value % CHUNK == 0,
        f"not a multiple of {CHUNK} up to {MOST_TOKENS}",
    ),
    CLIP_SKIP: (lambda value: is_whole(value) and value > 0, "not a whole number of at least 1"),
    EMPTY_CAPTION: (lambda value: value in (ZEROS, ENCODED), f"neither {ZEROS} nor {ENCODED}"),
    "variants": WHOLE,
    "without_mask": WHOLE,
    "failed": FAILURES,
    "made_from": (lambda value: isinstance(value, dict), "not a mapping of settings"),
}
SHARD_ENTRIES: dict[str, Entry] = {
    "name": (_is_name, "not the name of a file in this folder"),
    "samples": WHOLE,
    "bytes": WHOLE,
    "sha256": _DIGEST,
    REPEATS: (is_repeats, f"not pairs of repeats, from 1 to {MOST_REPEATS}, and a number of samples"),
}


def check_against_index(paths: Sequence[str | ShardPath], *, whole: bool, unfinished: bool = False) -> None:
    """Compare shards with the index of their folder, by name and size. Without an index, nothing is checked.

    Paths of shards on a server get the checksums in the index.

    Args:
        whole: all shards of the index must exist, because the user named a folder or a glob.
        unfinished: allow unfinished sets, whose index does not list the shards yet. They give a warning.

    Raises:
        UserError: a set is unfinished, or a shard is missing or differs from its entry.
    """
    folders: dict[ShardPath, list[ShardPath]] = {}
    look_at([path for path in map(as_path, paths) if isinstance(path, RemotePath)])
    for path in map(as_path, paths):
        folders.setdefault(path.parent, []).append(path)
    for folder, shards in folders.items():
        index = read_index(folder)
        if index is None:
            continue
        if not index.get("complete", True):
            message = (
                f"{folder / INDEX}: the set is unfinished, because writing it was interrupted; give the same command "
                f"of tools/preencode.py again to resume it, or {MAKE_AGAIN}"
            )
            refuse_if(not unfinished, message)
            logger.warning("%s", message)
            continue
        known = {shard["name"]: shard.get("bytes") for shard in index["shards"]}
        if isinstance(folder, RemotePath):
            _check_on_server(folder, shards, index["shards"])
            continue
        for path in shards:
            _check_shard(path, known)
        asked = known if whole else {path.name for path in shards}
        missing = [name for name in known if not (folder / name).is_file()]
        gone = next((name for name in missing if name in asked), None)
        if gone is not None:
            raise UserError(
                f"{folder / gone}: missing ({len(missing)} of {len(known)} shards in {INDEX}); "
                f"copy it again, name only existing shards, or {MAKE_AGAIN}"
            )


def _check_on_server(folder: RemotePath, shards: Sequence[RemotePath], entries: Sequence[Mapping[str, Any]]) -> None:
    """Compare the sizes of shards on a server with the index, and note its checksums in their paths."""
    known = {entry["name"]: entry for entry in entries}
    for path in shards:
        entry, size = known.get(path.name), state_of(path).identity[0]
        refuse_if(entry is None, f"{path}: not in {folder / INDEX}; move it to a folder of its own, or {MAKE_AGAIN}")
        if entry.get("bytes", size) != size:
            raise UserError(
                f"{path}: has {size} bytes, but {entry['bytes']} in {folder / INDEX}; copy it there again, or "
                f"{MAKE_AGAIN}"
            )
        path.sha256 = entry.get("sha256")


def _check_shard(path: Path, known: Mapping[str, int | None]) -> None:
    """Compare an existing shard with `known`, the sizes in the index by name; None for an unknown size."""
    check_file(path)
    index, exists, expected = path.parent / INDEX, path.exists(), known.get(path.name)
    size = path.stat().st_size if exists else None
    refuse_if(not exists and path.name not in known, f"{path}: no such file")
    refuse_if(path.name not in known, f"{path}: not in {index}; move it to a folder of its own, or {MAKE_AGAIN}")
    refuse_if(
        exists and expected is not None and size != expected,
        f"{path}: has {size} bytes, but {expected} in {index}; copy it again, or {MAKE_AGAIN}",
    )
