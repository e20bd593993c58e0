"""Writing files so that a kill or a full disk leaves the old file whole, and reading no more than is sane. No torch."""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.locks import is_running, process_namespace, process_start
from ldm.util import UserError

# Bytes: no member of a sample is larger, though a file with holes can claim terabytes.
MOST_IN_MEMBER = 1 << 30
_swept: set[str] = set()  # folders whose leftovers this process has removed


def read_at_most(path: str | Path, most: int) -> bytes:
    """The content of the file at `path`: a file with holes can claim terabytes.

    Raises:
        UserError: it is longer than `most` bytes.
    """
    path = Path(path)
    with path.open("rb") as file:
        data = file.read(min(most + 1, path.stat().st_size + 1))
    if len(data) > most:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, more than the {most} that such a file may have")
    return data


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, else it is removed.

    The folder is made if it is missing. The temporary name keeps the suffix of `path`, since writers choose by it.
    What killed processes of this machine left in the folder is removed. An `OSError` that names no file (a full disk)
    gets `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_once(path.parent)
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove from `folder` the temporary files of this machine's processes that are gone: each is as large as a file.

    Those of other machines, of other containers and of living processes stay.
    """
    host, namespace = re.escape(os.uname().nodename), process_namespace()
    pattern = re.compile(rf"\..+\.{host}\.(\d+)(?:-([0-9a-f]+)-([0-9a-f]+))?\.[0-9a-f]+\.tmp(\..*)?", re.DOTALL)
    with suppress(OSError):  # a folder that cannot be read, or a file that cannot be removed, is no hindrance
        for name in os.listdir(folder):  # noqa: PTH208  (names are all that is needed, of folders with many files)
            found = pattern.fullmatch(name) if name.startswith(".") else None
            if found is None or (found[3] and int(found[3], 16) != namespace):
                continue
            if not is_running(int(found[1]), int(found[2], 16) or None if found[2] else None):
                (folder / name).unlink(missing_ok=True)


def remove_leftovers_once(folder: Path) -> None:
    """Call `remove_leftovers`, once per folder in the life of this process."""
    key = os.path.abspath(folder)  # noqa: PTH100  (symbolic links need not be resolved)
    if key not in _swept:
        _swept.add(key)
        remove_leftovers(folder)


def _temporary(path: Path) -> Path:
    """A temporary name beside `path` that tells the machine, the container and the process that write it."""
    own, host = os.getpid(), os.uname().nodename
    process = f"{own}-{process_start(own) or 0:x}-{process_namespace():x}"
    return path.with_name(f".{path.stem}.{host}.{process}.{secrets.token_hex(4)}.tmp{path.suffix}")


def claim_file(candidates: Iterable[Path]) -> Path:
    """Create the first of `candidates` that does not exist yet, empty, and return it: nobody else gets that name."""
    for path in candidates:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise ValueError("no candidate was free")


def read_span(descriptor: int, offset: int, size: int, name: str) -> bytearray:
    """`size` bytes at `offset` of an open file; `UserError` naming `name` where it ends early."""
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise UserError(f"{name}: the file ends early; it changed after it was indexed")
    return bytearray(data)  # writable, so that tensors can share it


def leave_closed_terminal() -> None:
    """Let output to a terminal that was closed go nowhere: each line of it would be an error that ends the program."""
    for descriptor in (1, 2):
        try:
            closed = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
        except OSError:
            continue
        if closed:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
