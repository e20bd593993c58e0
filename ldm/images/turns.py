"""Turns among all processes of a user on this machine that decode images, so that few hold a large one at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

# Pixels and bytes beyond which an image waits for its turn. Decoding takes about 8 bytes per pixel: 16 processes hold
# 4 GB of smaller images, and one of them holds 1.5 GB of a large one.
LARGE, LARGE_FILE = 32_000_000, 1 << 26


class Turn:
    """Context manager that lets `take` go ahead in one process at a time; leaving it gives the turn back.

    The operating system gives back the turn of a process that dies. Where no lock file can be made, nobody waits.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # which unlocks it
            self._descriptor = None

    def take(self) -> None:
        """Wait for the turn, unless this object has it."""
        if self._descriptor is not None:
            return
        with suppress(OSError):
            self._descriptor = os.open(lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)


def lock_path() -> Path:
    """Return the file whose lock is the turn."""
    return Path(tempfile.gettempdir()) / f"ldm-large-image-{os.getuid()}.lock"
