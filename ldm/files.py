"""Opening of files that end, and writing that leaves the old file whole after a kill or a full disk. No torch."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldm.locks import is_running, process_namespace, process_start, short_name
from ldm.util import UserError, escaped

# Bytes: no member of a sample is larger, though a file with holes can claim terabytes.
MOST_IN_MEMBER = 1 << 30
_swept: set[str] = set()  # folders whose leftovers this process has removed

_KINDS = (
    (stat.S_ISDIR, "a folder; name a file in it"),
    (stat.S_ISFIFO, "a named pipe, not a file; write its content to a file first"),
    (stat.S_ISSOCK, "a socket, not a file"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
)
_MAPPED: dict[int, tuple[str, int]] = {}  # descriptors of the files that are memory-mapped: path, size when opened
_WRITING: dict[Path, int] = {}  # temporary files that are being written: the process that writes
_KEPT: list[object] = []  # the handler of SIGBUS, which must live as long as the process


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading, without waiting: opening a named pipe would wait, and a device never ends.

    Raises:
        UserError: it is a folder, a pipe, a socket or a device; says which.
        OSError: it is missing or may not be read.
    """
    path = Path(path)
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: no name that a file can have")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket; a folder, on some systems
            check_file(path)
        raise
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def check_file(path: str | Path) -> None:
    """Raise `UserError` if there is something at `path` that is no file; see `open_file`. It may be missing."""
    with suppress(FileNotFoundError, NotADirectoryError):
        _check_mode(path, Path(path).stat().st_mode)


def _check_mode(path: str | Path, mode: int) -> None:
    for is_kind, what in _KINDS:
        if is_kind(mode):
            raise UserError(f"{path}: {what}")


def read_at_most(path: str | Path, most: int) -> bytes:
    """Return the content of the file at `path`; a file with holes can claim terabytes.

    Raises:
        UserError: it is longer than `most` bytes, or is no file.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(most, size) + 1)
    if len(data) > most:
        raise UserError(f"{path}: has {size} bytes, more than the {most} that such a file may have")
    return data


def is_within(folder: str | Path, path: str | Path) -> bool:
    """Whether `path`, its links and `..` followed, lies in `folder`.

    Raises:
        UserError: `path` is no path.
    """
    try:
        return Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, or a null character
        raise UserError(f"{str(path)!r:.100}: is no path ({error})") from error


def check_within(folder: str | Path, path: str | Path, what: str) -> None:
    """Raise `UserError` unless `path` lies in `folder`, the folder of a run; `what` names it in the message."""
    if not is_within(folder, path):
        raise UserError(
            f"{what} {str(path)!r:.200}: lies outside {folder}, and a run writes in its own folder alone; leave it "
            "out, or give a place in that folder"
        )


def note_mapped(path: str | Path, descriptor: int, size: int) -> None:
    """Note that a file is memory-mapped, so that `exit_on_bus_error` can name it."""
    _MAPPED[descriptor] = (str(path), size)


def forget_mapped(descriptor: int) -> None:
    """Forget what `note_mapped` noted."""
    _MAPPED.pop(descriptor, None)


def exit_on_bus_error() -> None:
    """Make SIGBUS end the process in one line and exit code 1, with temporary files removed.

    The system sends it to a process that touches a memory map of a file that was cut short, or whose disk fails.
    Python's own handlers run between two of its instructions. The instruction at fault never ends, so this handler is a
    C function.
    """
    if sys.platform != "linux":
        return

    first = threading.Lock()

    def handle(signum: int) -> None:
        while not first.acquire(blocking=False):  # several threads of one computation get here together
            time.sleep(1)
        cut = next((path for number, (path, size) in list(_MAPPED.items()) if os.fstat(number).st_size < size), None)
        where = f"{escaped(cut)}: was cut short" if cut else "a memory-mapped file was cut short, or its disk fails,"
        os.write(2, f"error: {where} while it was read; start again with the whole file\n".encode(errors="replace"))
        for temporary, process in list(_WRITING.items()):
            if process == os.getpid():
                with suppress(OSError):
                    temporary.unlink()
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _KEPT.append(handler)
    ctypes.CDLL(None).signal(signal.SIGBUS.value, handler)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, else it is removed.

    The folder is made if it is missing. The temporary name keeps the suffix of `path`, since writers choose by it.
    What killed processes of this machine left in the folder is removed. An `OSError` that names no file (a full disk)
    gets `path`.

    Raises:
        UserError: at `path` is a folder, a pipe or a device.
    """
    path = Path(path)
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_once(path.parent)
    temporary = _temporary(path)
    _WRITING[temporary] = os.getpid()
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
        del _WRITING[temporary]
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
    return path.with_name(f".{short_name(path.stem)}.{host}.{process}.{secrets.token_hex(4)}.tmp{path.suffix}")


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
    """Return `size` bytes at `offset` of an open file; `UserError` naming `name` where it ends early."""
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
