"""Safe reading of regular files, and atomic writing that survives a kill or a full disk. Imports no torch."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
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
from ldm.printable import escaped
from ldm.util import UserError, refuse_if

# Size limit of a member of a sample, in bytes. A sparse file can claim terabytes.
MOST_IN_MEMBER = 1 << 30
_swept: set[str] = set()  # folders from which this process has removed leftovers

_KINDS = (
    (stat.S_ISDIR, "a folder; name a file in it"),
    (stat.S_ISFIFO, "a named pipe, not a file; write its content to a file first"),
    (stat.S_ISSOCK, "a socket, not a file"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
)
_MAPPED: dict[int, tuple[str, int]] = {}  # by descriptor of a memory-mapped file: path and size at opening
_WRITING: dict[Path, int] = {}  # by temporary file: the process that writes it
_KEPT: list[object] = []  # the handler of SIGBUS, kept for the life of the process


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Pipes could block, and devices may be endless.

    Raises:
        UserError: `path` is a folder, a pipe, a socket or a device.
        OSError: the file is missing or not readable.
    """
    path = Path(path)
    refuse_if("\0" in str(path), f"{str(path)!r}: not a valid file name")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket, or on some systems a folder
            check_file(path)
        raise
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def check_file(path: str | Path) -> None:
    """Raise `UserError` if `path` exists and is not a regular file; see `open_file`."""
    with suppress(FileNotFoundError, NotADirectoryError):
        _check_mode(path, Path(path).stat().st_mode)


def _check_mode(path: str | Path, mode: int) -> None:
    for is_kind, what in _KINDS:
        refuse_if(is_kind(mode), f"{path}: {what}")


def read_at_most(path: str | Path, most: int) -> bytes:
    """Return the content of the file at `path`, of at most `most` bytes.

    Raises:
        UserError: the file is larger, or not a regular file.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(most, size) + 1)
    check_size(path, max(size, len(data)), most)
    return data


def check_size(path: str | Path, size: int, most: int) -> None:
    """Raise `UserError` if the `size` in bytes of the file at `path` exceeds `most`."""
    refuse_if(size > most, f"{path}: has {size} bytes, but the limit for such a file is {most}")


def is_within(folder: str | Path, path: str | Path) -> bool:
    """Return True if `path` lies in `folder` after following links and `..`.

    Raises:
        UserError: `path` is not a valid path.
    """
    try:
        return Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # circular links, or a null character
        raise UserError(f"{str(path)!r:.100}: is not a valid path ({error})") from error


def check_within(folder: str | Path, path: str | Path, what: str) -> None:
    """Raise `UserError` unless `path` lies in the run folder `folder`. `what` names the path in the message."""
    refuse_if(
        not is_within(folder, path),
        f"{what} {str(path)!r:.200}: lies outside {folder}, and a run writes in its own folder alone; leave it "
        "out, or give a place in that folder",
    )


def note_mapped(path: str | Path, descriptor: int, size: int) -> None:
    """Record a memory-mapped file, so that `exit_on_bus_error` can name it."""
    _MAPPED[descriptor] = (str(path), size)


def forget_mapped(descriptor: int) -> None:
    """Remove the record of `note_mapped`."""
    _MAPPED.pop(descriptor, None)


def exit_on_bus_error() -> None:
    """Install a handler of SIGBUS that removes temporary files, prints one line and exits with code 1.

    The system sends SIGBUS for access to a memory map of a file that was truncated, or whose disk fails. Python runs
    its handlers between two instructions, but the faulting instruction never ends. The handler is therefore a C
    function.
    """
    if sys.platform != "linux":
        return

    first = threading.Lock()

    def handle(signum: int) -> None:
        while not first.acquire(blocking=False):  # several threads may fault together
            time.sleep(1)
        cut = next((path for number, (path, size) in list(_MAPPED.items()) if os.fstat(number).st_size < size), None)
        where = f"{escaped(cut)}: was truncated" if cut else "a memory-mapped file was truncated, or its disk fails,"
        os.write(2, f"error: {where} while it was read; start again with the complete file\n".encode(errors="replace"))
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
    """Yield a temporary path in the folder of `path`. On success, sync and rename it to `path`, else remove it.

    A missing folder is created. The temporary name has the suffix of `path`, because writers may choose the format by
    it. Temporary files of killed processes of this machine are removed. `path` is added to an `OSError` without a file
    name, such as for a full disk.

    Raises:
        UserError: `path` is a folder, a pipe or a device.
    """
    path = Path(path)
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_once(path.parent)
    temporary = temporary_path(path)
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
        os.fsync(folder)  # makes the rename survive a power failure
    finally:
        os.close(folder)


def _leave_unfinished() -> None:
    """Replace the files of unfinished `atomic_write`s by the null device, in a forked process.

    A data worker that is forked while a thread writes a checkpoint would keep its disk space after it is replaced.
    """
    unfinished: list[os.stat_result] = []
    for temporary in _WRITING:
        with suppress(OSError):
            unfinished.append(temporary.stat())
    if not unfinished or not os.path.isdir("/proc/self/fd"):  # noqa: PTH112
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        with suppress(OSError):  # the descriptor of the listing
            state = os.fstat(descriptor)
            if any(os.path.samestat(state, found) for found in unfinished):
                os.dup2(null, descriptor)
    os.close(null)


os.register_at_fork(after_in_child=_leave_unfinished)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of ended processes of this machine from `folder`.

    Files of other machines, other containers and running processes are kept.
    """
    host, namespace = re.escape(os.uname().nodename), process_namespace()
    pattern = re.compile(rf"\..+\.{host}\.(\d+)(?:-([0-9a-f]+)-([0-9a-f]+))?\.[0-9a-f]+\.tmp(\..*)?", re.DOTALL)
    with suppress(OSError):  # ignore unreadable folders and files that cannot be removed
        for name in os.listdir(folder):  # noqa: PTH208  (names are all that is needed, of folders with many files)
            found = pattern.fullmatch(name) if name.startswith(".") else None
            if found is None or (found[3] and int(found[3], 16) != namespace):
                continue
            if not is_running(int(found[1]), int(found[2], 16) or None if found[2] else None):
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name, ignore_errors=True)
                else:
                    (folder / name).unlink(missing_ok=True)


def remove_leftovers_once(folder: Path) -> None:
    """Call `remove_leftovers` once per folder and process."""
    key = os.path.abspath(folder)  # noqa: PTH100  (symbolic links need not be resolved)
    if key not in _swept:
        _swept.add(key)
        remove_leftovers(folder)


def temporary_path(path: Path) -> Path:
    """Return a temporary path in the folder of `path`. Its name identifies machine, container and process."""
    own, host = os.getpid(), os.uname().nodename
    process = f"{own}-{process_start(own) or 0:x}-{process_namespace():x}"
    return path.with_name(f".{short_name(path.stem)}.{host}.{process}.{secrets.token_hex(4)}.tmp{path.suffix}")


def claim_file(candidates: Iterable[Path]) -> Path:
    """Create the first of `candidates` that does not exist, as an empty file, and return its path."""
    for path in candidates:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise ValueError("all candidates exist")


def read_span(descriptor: int, offset: int, size: int, name: str) -> bytearray:
    """Return `size` bytes at `offset` of an open file. Raise `UserError` with `name` if the file is too short."""
    data = os.pread(descriptor, size, offset)
    refuse_if(len(data) != size, f"{name}: the file is truncated; it changed after it was indexed")
    return bytearray(data)  # writable, so that tensors can share its memory


def leave_closed_terminal() -> None:
    """Discard output to a closed terminal, because each line would raise an error that ends the program."""
    for descriptor in (1, 2):
        try:
            closed = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
        except OSError:
            continue
        if closed:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
