"""How the process's memory behaves while a training computes or keeps state on the host."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process, for the next step to use; whether the C library can (glibc's can).

    By default glibc gives a large tensor's pages back as soon as it is freed, and the next one's are fetched from the
    kernel and zeroed one by one: on a CPU that is a third of a step of Stable Diffusion's UNet (benchmarks/RESULTS.md).
    What the process has taken at its peak, and the gaps in it, it then keeps until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])
