"""Atomic writing of whole folders. Imports no torch."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.files import remove_leftovers_once, temporary_path
from ldm.util import refuse_if

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`. On success, it takes the place of `path` as a whole, else it is removed.

    An existing folder `path` is replaced. On Linux there is a folder at `path` at any moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_once(path.parent)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            _sync(folder)
        _replace(temporary, path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what was at `path`, after an exchange
    _sync(path.parent)


def _replace(new: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        new.replace(path)
    elif not _exchange(new, path):
        kept = temporary_path(path)
        path.rename(kept)
        try:
            new.rename(path)
        except BaseException:
            kept.rename(path)
            raise
        shutil.rmtree(kept, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Return False if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync(folder: str | Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(path: Path, marker: str) -> None:
    """Raise `UserError` unless `path` is missing, an empty folder, or a folder with the file `marker`."""
    if not path.exists() and not path.is_symlink():
        return
    refuse_if(path.is_symlink(), f"{path}: is a link, and a folder is replaced as a whole; name the folder itself")
    refuse_if(not path.is_dir(), f"{path}: is not a folder; name another one")
    refuse_if(
        any(path.iterdir()) and not (path / marker).is_file(),
        f"{path}: has other files (no {marker}), and would be replaced as a whole; name a new folder",
    )
