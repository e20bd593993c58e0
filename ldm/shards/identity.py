"""Identity of a shard: the file that is opened again must be the one whose headers were read."""

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

Identity = tuple[int, int, int]  # bytes, time of change in ns, inode

# What a network folder says for a moment while its server restarts.
_MOMENTARY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN)
_PAUSES = (0.1, 1.0, 5.0, 15.0)  # seconds before each further try


def identity_of(descriptor: int) -> Identity:
    """Return the identity of an open file."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns, found.st_ino


def check_identity(descriptor: int, path: Path, expected: Identity) -> None:
    """Raise `UserError` unless the open file is the one that was indexed."""
    if identity_of(descriptor) != expected:
        raise UserError(
            f"{path}: was replaced or changed after training began to read it; put the old shard back and go on with "
            "--resume, or start a new run with the new one"
        )


def with_retries(read: Callable[[], T], path: Path) -> T:
    """Call `read`, again after errors that pass by themselves on network folders, a bounded number of times.

    Raises:
        UserError: the file cannot be read; names `path` and the cause.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: is gone: it was deleted or moved after training began to read it; put it back"
            ) from error
        except OSError as error:
            if pause is None or error.errno not in _MOMENTARY:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
            logger.warning("%s: %s; trying again in %g s", path, error.strerror, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")
