"""`index.json` beside a set of shards: what pre-encoding wrote there, and whether it came to its end.

Format 2 has the keys

    format, out, complete     2; the name pattern of the shards; false as long as some are missing
    autoencoder, text_tower   digests of the weights that made the set, see `ldm.checkpoint.weights_digest`; of two text
                              towers, as SDXL has, text_tower_2 is that of the second
    scale_factor              the model's; what is stored is unscaled
    family                    key of the family of models in `ldm.release.families` that made the set; null for none
    members                   names of the arrays of a sample, without the numbers of masks and without a teacher's
    empty_caption             what stands for the empty caption: its encoding, `encoded`, or `zeros`
    shards                    name, samples, bytes and sha256 of each
    samples                   in all

and those that its maker adds: see `ldm.encoding.preencode`. Format 1 has no digests, and its shards may lack bytes and
sha256. What an index does not have is not compared; what it has is held to its type, since people edit these files.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import atomic_write, check_file, read_at_most
from ldm.util import UserError

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT_VERSION = 2
AUTOENCODER = "autoencoder"
# Keys that have the digests of encoders, and what they are.
ENCODERS = {AUTOENCODER: "autoencoder", "text_tower": "text tower", "text_tower_2": "second text tower"}
FAMILY, MEMBERS, EMPTY_CAPTION = "family", "members", "empty_caption"
ZEROS, ENCODED = "zeros", "encoded"
MAKE_AGAIN = "make it again with --overwrite, by tools/preencode.py or tools/make_prior.py"
_MEND = f"put back what was written there, or {MAKE_AGAIN}"
_MOST_BYTES = 1 << 28  # of the file; a million shards take a sixth


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the index of the set in `folder`; `complete` in it says whether the set is."""
    with atomic_write(folder / INDEX) as path:
        path.write_text(json.dumps(content, indent=1) + "\n")


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of the set in `folder`; None if there is none.

    Raises:
        UserError: it is no index of a set.
    """
    path = folder / INDEX
    try:
        index = json.loads(read_at_most(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; {MAKE_AGAIN}") from error
    if not isinstance(index, dict) or "shards" not in index:
        raise UserError(f"{path}: lists no shards; {MAKE_AGAIN}, or remove it if it is not that of a set of shards")
    version = index.get("format", 1)
    if not (is_whole(version) and 1 <= version <= FORMAT_VERSION):
        raise UserError(f"{path}: has format {version!r:.80}, this program knows 1 to {FORMAT_VERSION}; {MAKE_AGAIN}")
    check_entries(f"{path}: ", index, _ENTRIES)
    for number, shard in enumerate(index["shards"]):
        where = f"{path}: shards[{number}]"
        if not isinstance(shard, dict):
            raise UserError(f"{where} is {shard!r:.80}, not the name, bytes and sha256 of a shard; {_MEND}")
        needed = ("name",) if version == 1 else ("name", "bytes", "sha256")
        missing = next((key for key in needed if key not in shard), None)
        if missing is not None:
            raise UserError(f"{where} has no {missing}; {_MEND}")
        check_entries(f"{where}: its ", shard, SHARD_ENTRIES)
    return index


def check_entries(where: str, found: Mapping[str, Any], entries: Mapping[str, Entry], mend: str = _MEND) -> None:
    """Raise `UserError` for the first of `entries` that is in `found` and not what it should be."""
    for key, (fits, what) in entries.items():
        if key in found and not fits(found[key]):
            raise UserError(f"{where}{key} is {found[key]!r:.80}, {what}; {mend}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_scale(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:  # an integer beyond all floats
        return False


def is_failures(value: Any) -> bool:
    """Whether it lists images that could not be read."""
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "reason"))
        for entry in value
    )


def _is_name(name: Any) -> bool:
    """Whether it names a file in the index's folder."""
    if not isinstance(name, str) or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        return False
    return name.splitlines() == [name]  # it is to be in a message of one line


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.isalnum()


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_key(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isidentifier())


Entry = tuple[Callable[[Any], bool], str]  # whether a value is right, and what to say of one that is not
WHOLE: Entry = (is_whole, "not a whole number of at least 0")
_DIGEST: Entry = (is_digest, "which is no digest")
FAILURES: Entry = (is_failures, "not a list of the name and the reason of images that could not be read")
_ENTRIES: dict[str, Entry] = {
    "shards": (lambda value: isinstance(value, list), "not a list"),
    "complete": (lambda value: isinstance(value, bool), "neither true nor false"),
    "samples": WHOLE,
    **dict.fromkeys(ENCODERS, (lambda value: value is None or is_digest(value), "which is no digest")),
    "scale_factor": (_is_scale, "not a finite number above 0"),
    FAMILY: (_is_key, "not the key of a family of models"),
    MEMBERS: (_is_names, "not a list of names"),
    EMPTY_CAPTION: (lambda value: value in (ZEROS, ENCODED), f"neither {ZEROS} nor {ENCODED}"),
    "failed": FAILURES,
    "made_from": (lambda value: isinstance(value, dict), "not what the set is made from, by name"),
}
SHARD_ENTRIES: dict[str, Entry] = {
    "name": (_is_name, "which names no file in this folder"),
    "samples": WHOLE,
    "bytes": WHOLE,
    "sha256": _DIGEST,
}


def check_against_index(paths: Sequence[str | Path], *, whole: bool, unfinished: bool = False) -> None:
    """Hold shards against the index of their folder, by name and size; shards without an index are taken as they are.

    `whole` says that folders or globs named them: then no shard of the index may be missing. Of an `unfinished` set
    that is asked for there is only a warning: its index does not know its shards yet.

    Raises:
        UserError: a set is unfinished, a shard is missing, or is not the one that was written with the index.
    """
    folders: dict[Path, list[Path]] = {}
    for path in map(Path, paths):
        folders.setdefault(path.parent, []).append(path)
    for folder, shards in folders.items():
        index = read_index(folder)
        if index is None:
            continue
        if not index.get("complete", True):
            said = (
                f"{folder / INDEX}: the set is unfinished, its making was interrupted; give the same command of "
                f"tools/preencode.py again to go on, or {MAKE_AGAIN}"
            )
            if not unfinished:
                raise UserError(said)
            logger.warning("%s", said)
            continue
        known = {shard["name"]: shard.get("bytes") for shard in index["shards"]}
        for path in shards:
            check_file(path)
            if not path.exists():
                if path.name not in known:
                    raise UserError(f"{path}: no such file")
                continue
            if path.name not in known:
                raise UserError(f"{path}: not in {folder / INDEX}; move it to a folder of its own, or {MAKE_AGAIN}")
            size = path.stat().st_size
            if known[path.name] is not None and size != known[path.name]:
                raise UserError(
                    f"{path}: has {size} bytes, but {known[path.name]} in {folder / INDEX}; copy it again, or "
                    f"{MAKE_AGAIN}"
                )
        asked = known if whole else {path.name for path in shards}
        missing = [name for name in known if not (folder / name).is_file()]
        gone = next((name for name in missing if name in asked), None)
        if gone is not None:
            raise UserError(
                f"{folder / gone}: missing, as {len(missing)} of the {len(known)} shards in {INDEX} are; "
                f"copy it again, name only shards that are there, or {MAKE_AGAIN}"
            )
