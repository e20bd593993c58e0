"""Verification of shards by the SHA-256 in their index. Each file is read once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ldm.files import atomic_write, open_file, read_at_most
from ldm.remote.path import RemotePath, ShardPath, as_path
from ldm.shards.index import MAKE_AGAIN, read_index
from ldm.util import UserError

logger = logging.getLogger(__name__)

# File beside the shards with the results. A result is valid while size and modification time are unchanged.
_SEEN = ".verified.json"
_MOST_BYTES = 1 << 28  # size limit of this file
_THREADS = 4  # hashing releases Python's lock


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    hashed = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def files_sha256(paths: Sequence[Path], folder: Path) -> str:
    """Return the SHA-256, in hex, of the names below `folder` and the checksums of the files at `paths`."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in paths]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def indexed_sha256(folder: Path) -> dict[str, str]:
    """Return the SHA-256, in hex, of the shards by name, as the index in `folder` has them."""
    index = read_index(folder) or {"shards": []}
    return {shard["name"]: shard["sha256"] for shard in index["shards"] if shard.get("sha256")}


def verify_shards(paths: Sequence[str | ShardPath]) -> None:
    """Compare the shards at `paths` with the checksums in the index of their folder, if there is one.

    Each file is read completely. The result is stored in `.verified.json` beside it, so that it is read only once. Of
    shards on a server, only whole copies are compared, when they are made.

    Raises:
        UserError: a shard has another checksum.
    """
    folders: dict[Path, list[Path]] = {}
    for path in map(as_path, paths):
        if isinstance(path, RemotePath):
            continue
        folders.setdefault(path.parent, []).append(path)
    for folder, shards in folders.items():
        expected = indexed_sha256(folder)
        _verify_folder(folder, [path for path in shards if path.name in expected and path.is_file()], expected)


def _verify_folder(folder: Path, shards: list[Path], expected: dict[str, str]) -> None:
    seen = _read_seen(folder)
    states = {path: [path.stat().st_size, path.stat().st_mtime_ns] for path in shards}
    # Files that did not match are read again, because a copy may keep the modification time.
    unread = [path for path in shards if seen.get(path.name) != [*states[path], expected[path.name]]]
    if unread:
        size = sum(states[path][0] for path in unread)
        logger.info("%s: reading %d shards (%.1f GB) to verify their checksums", folder, len(unread), size / 1e9)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(unread, pool.map(file_sha256, unread), strict=True))
    seen |= {path.name: [*states[path], digest] for path, digest in found.items()}
    if unread:
        with suppress(OSError), atomic_write(folder / _SEEN) as path:  # in a read-only folder, each run verifies again
            path.write_text(json.dumps(seen) + "\n")
    for path in shards:
        if seen[path.name][2] != expected[path.name]:
            raise UserError(
                f"{path}: was changed: its SHA-256 is {seen[path.name][2][:12]}…, but "
                f"{expected[path.name][:12]}… in its index; copy it again, or {MAKE_AGAIN}"
            )


def _read_seen(folder: Path) -> dict[str, list]:
    try:
        seen = json.loads(read_at_most(folder / _SEEN, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = seen.items() if isinstance(seen, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 3}
