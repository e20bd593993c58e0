"""Faults of servers: those that pass are retried, and all others are one line."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ldm.remote.path import RemotePath
from ldm.util import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES = (0.2, 1.0, 5.0, 15.0, 30.0)  # seconds before each retry
_LONGEST = 60.0  # seconds that a server may ask to wait


class Momentary(Exception):
    """Fault that may pass. `wait` is the number of seconds that the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0) -> None:
        super().__init__(reason)
        self.wait = wait


def is_of_disk(error: OSError) -> bool:
    """Return True for an error of the disk to which an answer is written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NotServed(UserError):
    """The server has no such file, or does not give it to this user."""


def ask_with_retries(ask: Callable[[], T], path: RemotePath) -> T:
    """Call `ask`, again after each `Momentary` fault, with growing pauses.

    Raises:
        UserError: the fault did not pass. The message names `path` and the fault.
    """
    for pause in PAUSES:
        try:
            return ask()
        except Momentary as fault:
            wait = max(pause, min(fault.wait, _LONGEST))
            logger.warning("%s: %s; retrying in %g s", path, fault, wait)
            time.sleep(wait)
    try:
        return ask()
    except Momentary as fault:
        raise UserError(
            f"{path}: cannot be read: {fault}, {len(PAUSES) + 1} times; continue when the server is back (a training: "
            "with --resume)"
        ) from None
