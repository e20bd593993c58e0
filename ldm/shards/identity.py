"""Identity of a shard, to detect that a file was replaced after its headers were read."""

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


def identity_of(descriptor: int) -> Identity:
    """Return the identity of an open file."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns, found.st_ino


def check_identity(descriptor: int, path: Path, expected: Identity) -> None:
    """Raise `UserError` unless the open file has the identity `expected`."""
    if identity_of(descriptor) != expected:
        raise UserError(
            f"{path}: was replaced or changed during training; restore the old shard and continue with "
            "--resume, or start a new run with the new shard"
        )


def with_retries(read: Callable[[], T], path: Path) -> T:
    """Call `read`, with a few retries after transient errors of network folders.

    Raises:
        UserError: the file cannot be read. The message names `path` and the cause.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except FileNotFoundError as error:
            raise UserError(f"{path}: was deleted or moved during training; restore it") from error
        except OSError as error:
            if pause is None or error.errno not in _MOMENTARY:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
            logger.warning("%s: %s; retrying in %g s", path, error.strerror, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")
