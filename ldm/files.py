"""Writing files so that a kill or a full disk leaves the old file whole, and reading no more than is sane. No torch."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.util import UserError

# Bytes: no member of a sample is larger, though a file with holes can claim terabytes.
MOST_IN_MEMBER = 1 << 30


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


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, else it is removed.

    The folder is made if it is missing. The temporary name keeps the suffix of `path`, since writers choose by it.
    What killed processes of this machine left of this file is removed. An `OSError` that names no file (a full disk)
    gets `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    # Machines and containers share folders: a process id can stand for several processes, and so can a host name.
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")
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


def _remove_leftovers(path: Path) -> None:
    """Remove this machine's temporary files of `path` whose processes are gone: each is as large as the file."""
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}*.tmp{glob.escape(path.suffix)}"):
        number = leftover.name.removeprefix(_prefix(path)).partition(".")[0]
        if number.isdecimal() and not _is_running(int(number)):
            leftover.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    """How the temporary files of `path` begin on this machine."""
    return f".{path.stem}.{os.uname().nodename}."


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def read_span(descriptor: int, offset: int, size: int, name: str) -> bytearray:
    """`size` bytes at `offset` of an open file; `UserError` naming `name` where it ends early."""
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise UserError(f"{name}: the file ends early; it changed after it was indexed")
    return bytearray(data)  # writable, so that tensors can share it
