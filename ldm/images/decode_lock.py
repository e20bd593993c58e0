"""Lock for decoding large images, shared by all processes of a user on this machine, to limit memory."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.host_memory import return_freed_memory

# Pixels and bytes from which an image needs the lock. Decoding takes about 8 bytes per pixel: 16 processes take 4 GB
# for smaller images, and one process takes 1.5 GB for a large image.
LARGE, LARGE_FILE = 32_000_000, 1 << 26


class DecodeLock:
    """Context manager whose `take` acquires the lock. Leaving the context returns the image's memory, then the lock.

    The operating system releases the lock of a process that dies. If no lock file can be created, there is no lock.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def __enter__(self) -> DecodeLock:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._descriptor is not None:
            return_freed_memory()
            os.close(self._descriptor)  # releases the lock
            self._descriptor = None

    def take(self) -> None:
        """Wait for the lock. Return at once if this object holds it."""
        if self._descriptor is not None:
            return
        with suppress(OSError):
            self._descriptor = os.open(lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)


def lock_path() -> Path:
    """Return the path of the lock file."""
    return Path(tempfile.gettempdir()) / f"ldm-large-image-{os.getuid()}.lock"
