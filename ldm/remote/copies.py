"""Reading of files on servers: their state, parts of them, and copies in a local cache.

The cache has a size limit, and the copies that were not used for the longest time are removed. Its processes share it.
The name of a copy has the file's identity, so a copy is never of another version. If the server tells no versions, the
copies of earlier runs are not used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldm.files import atomic_write, open_file
from ldm.identity import Identity, Replaced
from ldm.remote.file_server import Server, State, is_versioned
from ldm.remote.path import RemotePath
from ldm.remote.retries import ask_with_retries
from ldm.util import UserError

FOLDER, LIMIT = "LATENT_FINETUNE_CACHE", "LATENT_FINETUNE_CACHE_GB"  # environment variables
_DEFAULT_LIMIT = 20.0  # GB
_TOGETHER = 16  # states that are asked for at a time
_TRIES = 10  # to open a copy that other processes may remove
_made: set[Path] = set()  # copies of this process
_states: dict[RemotePath, State] = {}  # as they were when the set was opened


def state_of(path: RemotePath, again: bool = False) -> State:
    """Return the state of a file as this process first saw it, or as it is now if `again`.

    Raises:
        NotServed: the server has no such file, or does not give it.
        UserError: the server cannot be reached, or not read.
    """
    if again or path not in _states:
        server = _server_of(path)
        _states[path] = ask_with_retries(server.state, path)
    return _states[path]


def look_at(paths: Iterable[RemotePath]) -> None:
    """Ask for the present states of files, several at a time."""
    with ThreadPoolExecutor(_TOGETHER) as pool:
        list(pool.map(lambda path: state_of(path, again=True), paths))


def read_part(path: RemotePath, identity: Identity, offset: int, size: int) -> bytearray:
    """Return up to `size` bytes of a file at `offset`, fewer at its end.

    Raises:
        Replaced: the file has no longer the `identity`.
    """
    if state_of(path).has_parts:
        server = _server_of(path)
        found = ask_with_retries(lambda: server.read(offset, size), path)
        if found is not None:
            _check_identity(path, found[0], identity)
            return bytearray(found[1])
    with open_copy(path, identity) as file:
        return bytearray(os.pread(file.fileno(), size, offset))


def open_copy(path: RemotePath, identity: Identity | None = None) -> BinaryIO:
    """Open a local copy of a file, which must have the `identity`; its present version if None.

    Raises:
        NotServed: the server has no such file, or does not give it.
        Replaced: the file has no longer the identity.
    """
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return open_file(local_copy(path, identity))
    raise UserError(f"{cache_folder()}: other processes remove copies before they are used; raise {LIMIT}")


def local_copy(path: RemotePath, identity: Identity | None = None) -> Path:
    """Return the path of a local copy of a file; see `open_copy`. Another process may remove the copy."""
    identity = identity or state_of(path, again=True).identity
    copy = _place(path, identity)
    if has_copy(path, identity):
        with suppress(OSError):
            os.utime(copy)  # the time of its last use
        return copy
    with _one_at_a_time(copy):
        if not has_copy(path, identity):  # another process may have made it
            _make_room(path, identity[0])
            _download(path, identity, copy)
            _made.add(copy)
    return copy


def has_copy(path: RemotePath, identity: Identity) -> bool:
    """Return True if there is a local copy of a file that is surely of the present version."""
    copy = _place(path, identity)
    return copy.exists() and (is_versioned(identity) or copy in _made)


def cache_folder() -> Path:
    """Return the folder of the copies."""
    given = os.environ.get(FOLDER)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latent-finetune" / "remote"


def cache_limit() -> float:
    """Return the size limit of the cache in bytes."""
    text = os.environ.get(LIMIT) or str(_DEFAULT_LIMIT)
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise UserError(f"{LIMIT}={text}: give the size limit of {cache_folder()} in GB, such as 50")
    return float(text) * 1e9


def _server_of(path: RemotePath) -> Server:
    # Imported here, because aiohttp takes 0.2 s, and most runs have local files alone.
    if path.scheme.startswith("http"):
        from ldm.remote.http import HttpServer

        return HttpServer(path)
    from ldm.remote.stores import StoreServer

    return StoreServer(path)


def _check_identity(path: RemotePath, found: Identity, expected: Identity) -> None:
    if found != expected:
        raise Replaced(
            f"{path}: was replaced or changed while it was in use; restore the old file and continue (a training: with "
            "--resume), or start anew with the new file"
        )


def _place(path: RemotePath, identity: Identity) -> Path:
    size, version, _ = identity
    suffix = re.sub(r"[^\w.]", "", Path(path.name).suffix[:20])
    return cache_folder() / f"{path.digest}-{size}-{version:x}{suffix}"


@contextmanager
def _one_at_a_time(copy: Path) -> Iterator[None]:
    """Let one process at a time make a copy. The few lock files remain."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        opened = (copy.parent / f".{copy.name[:2]}.lock").open("a")
    except OSError as error:
        raise UserError(
            f"{copy.parent}: cannot keep copies of files there: {error.strerror}; set {FOLDER} to another folder"
        ) from error
    with opened as file:
        with suppress(OSError):  # a file system without locks: copies are made twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(path: RemotePath, size: int) -> None:
    """Remove the copies that were not used for the longest time, until one of `size` bytes fits.

    Raises:
        UserError: it is larger than the cache.
    """
    limit = cache_limit()
    if size > limit:
        raise UserError(
            f"{path}: has {size / 1e9:.1f} GB, more than the {limit / 1e9:g} GB of {cache_folder()}; set {LIMIT}"
        )
    copies = []
    for entry in os.scandir(cache_folder()):
        with suppress(OSError):  # removed by another process
            if entry.is_file():
                copies.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
    total = size + sum(size for _, size, _ in copies)
    for _, freed, name in sorted(copies):
        if total <= limit:
            return
        if not os.path.basename(name).startswith("."):  # noqa: PTH119  (locks, and copies that are being made)
            Path(name).unlink(missing_ok=True)
            total -= freed


def _download(path: RemotePath, identity: Identity, copy: Path) -> None:
    """Write the copy, and compare its identity and checksum."""
    server = _server_of(path)
    try:
        with atomic_write(copy) as temporary, temporary.open("w+b") as file:
            found = ask_with_retries(lambda: server.save(file), path)
            _check_identity(path, found, identity)
            if path.sha256 is not None and _sha256(file) != path.sha256:
                raise UserError(f"{path}: was changed: its SHA-256 is not that of its index; copy the set there again")
    except OSError as error:
        raise UserError(
            f"{copy.parent}: cannot keep a copy of {path}: {error.strerror}; set {FOLDER} to another folder, or {LIMIT}"
        ) from error


def _sha256(file: BinaryIO) -> str:
    hashed = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        hashed.update(block)
    return hashed.hexdigest()
