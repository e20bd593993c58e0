"""`index.json` beside a set of shards: what pre-encoding wrote there, and whether it came to its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import atomic_write, read_at_most
from ldm.util import UserError

INDEX = "index.json"
_MOST_BYTES = 1 << 28  # of the file; a million shards take a sixth
_AGAIN = "make it again with --overwrite, by tools/preencode.py or tools/make_prior.py"


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
        raise UserError(f"{path}: not JSON: {error}; {_AGAIN}") from error
    shards = index.get("shards") if isinstance(index, dict) else None
    if not (isinstance(shards, list) and all(map(_is_shard, shards))):
        raise UserError(f"{path}: lists no shards; {_AGAIN}, or remove it if it is not that of a set of shards")
    if not isinstance(index.get("complete", True), bool):
        raise UserError(f"{path}: complete is {index['complete']!r:.80}, neither true nor false; {_AGAIN}")
    return index


def _is_shard(shard: Any) -> bool:
    """Whether an entry of the index names a file in its folder."""
    name = shard.get("name") if isinstance(shard, dict) else None
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def check_against_index(paths: Sequence[str | Path], *, whole: bool) -> None:
    """Hold shards against the index of their folder, by name and size; shards without an index are taken as they are.

    `whole` says that folders or globs named them: then no shard of the index may be missing.

    Raises:
        UserError: a set is unfinished, or a shard is not the one that was written with the index.
    """
    folders: dict[Path, list[Path]] = {}
    for path in map(Path, paths):
        folders.setdefault(path.parent, []).append(path)
    for folder, shards in folders.items():
        index = read_index(folder)
        if index is None:
            continue
        if not index.get("complete", True):
            raise UserError(f"{folder / INDEX}: the set is unfinished, its making was interrupted; {_AGAIN}")
        known = {shard["name"]: shard.get("bytes") for shard in index["shards"]}
        for path in shards:
            if path.name not in known:
                raise UserError(f"{path}: not in {folder / INDEX}; move it to a folder of its own, or {_AGAIN}")
            size = path.stat().st_size if path.is_file() else None  # whoever reads it says that it is missing
            if known[path.name] is not None and size is not None and size != known[path.name]:
                raise UserError(f"{path}: has {size} bytes, but {known[path.name]} in {folder / INDEX}; {_AGAIN}")
        missing = [name for name in known if not (folder / name).is_file()]
        if whole and missing:
            raise UserError(
                f"{folder / missing[0]}: missing, as {len(missing)} of the {len(known)} shards in {INDEX} are; "
                f"{_AGAIN}, or name the shards to use"
            )
