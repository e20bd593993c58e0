"""`index.json` beside a set of shards: what pre-encoding wrote there, and whether it came to its end.

Format 2 has the keys

    format, out, complete     2; the name pattern of the shards; false as long as some are missing
    autoencoder, text_tower   digests of the weights that made the set, see `ldm.checkpoint.weights_digest`
    scale_factor              the model's; what is stored is unscaled
    shards                    name, samples, bytes and sha256 of each
    samples                   in all

and those that its maker adds: see `ldm.training.preencode`. Format 1 has no digests. What an index does not have is not
compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from ldm.files import atomic_write, read_at_most
from ldm.util import UserError

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT_VERSION = 2
ENCODERS = {"autoencoder": "autoencoder", "text_tower": "text tower"}  # keys that have their digests, and what they are
MAKE_AGAIN = "make it again with --overwrite, by tools/preencode.py or tools/make_prior.py"
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
    shards = index.get("shards") if isinstance(index, dict) else None
    if not (isinstance(shards, list) and all(map(_is_shard, shards))):
        raise UserError(f"{path}: lists no shards; {MAKE_AGAIN}, or remove it if it is not that of a set of shards")
    if not isinstance(index.get("complete", True), bool):
        raise UserError(f"{path}: complete is {index['complete']!r:.80}, neither true nor false; {MAKE_AGAIN}")
    for key in ENCODERS:
        if not _is_digest(index.get(key)):
            raise UserError(f"{path}: {key} is {index[key]!r:.80}, which is no digest; {MAKE_AGAIN}")
    version = index.get("format", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"{path}: has format {version!r}, this program knows 1 to {FORMAT_VERSION}; {MAKE_AGAIN}")
    return index


def _is_shard(shard: Any) -> bool:
    """Whether an entry of the index names a file in its folder, and what it says of it can be compared."""
    if not isinstance(shard, dict) or not isinstance(shard.get("bytes"), (int, NoneType)):
        return False
    return _is_name(shard.get("name")) and _is_digest(shard.get("sha256"))


def _is_name(name: Any) -> bool:
    if not isinstance(name, str) or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        return False
    return name.splitlines() == [name]  # it is to be in a message of one line


def _is_digest(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isalnum())


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
            if not path.is_file():
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
