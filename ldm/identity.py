"""Identity of a file, to detect that it was replaced after its content was indexed. Imports no torch."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ldm.util import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Identity = tuple[int, int, int]  # size in bytes, modification time in ns, inode

# Errors of a network folder while its server restarts.
_MOMENTARY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN)
_PAUSES = (0.1, 1.0, 5.0, 15.0)  # seconds before each retry


class Replaced(UserError):
    """A file was replaced or changed after its content was indexed."""


def identity_of(descriptor: int) -> Identity:
    """Return the identity of an open file."""
    return _identity(os.fstat(descriptor))


def identity_of_path(path: Path) -> Identity:
    """Return the identity of the file at `path`; zeros if there is none, which no file has."""
    try:
        return _identity(path.stat())
    except OSError:
        return 0, 0, 0


def _identity(found: os.stat_result) -> Identity:
    return found.st_size, found.st_mtime_ns, found.st_ino


def check_identity(descriptor: int, path: Path, expected: Identity) -> None:
    """Raise `Replaced` unless the open file has the identity `expected`."""
    if identity_of(descriptor) != expected:
        raise Replaced(
            f"{path}: was replaced or changed while it was in use; restore the old file and continue (a training: with "
            "--resume), or start anew with the new file"
        )


def read_with_retries(read: Callable[[], T], path: Path) -> T:
    """Call `read`, with a few retries after transient errors of network folders.

    Raises:
        UserError: the file cannot be read. The message names `path` and the cause.
    """
    try:
        return retried(read, path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: was deleted or moved while it was in use; restore it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def retried(read: Callable[[], T], path: Path) -> T:
    """Call `read` as `read_with_retries` does; raises its last `OSError` as it is."""
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in _MOMENTARY:
                raise
            logger.warning("%s: %s; retrying in %g s", path, error.strerror, pause)
            time.sleep(pause)
    return read()
