"""Freed host memory: kept for the next step, or returned to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

# Parameters of mallopt(3) in glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next step. Return False if the C library is not glibc.

    By default, glibc returns the pages of a large tensor to the kernel as soon as it is freed. The kernel must then
    zero the pages of the next tensor. On a CPU, this takes a third of a step of Stable Diffusion's UNet
    (benchmarks/RESULTS.md). With this setting, the process keeps its peak memory until it ends.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def return_freed_memory() -> None:
    """Return freed memory of this process to the system, if the C library is glibc.

    Otherwise, glibc may keep blocks of up to 32 MiB, such as those of Pillow's images, until the blocks allocated after
    them are freed.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):  # another C library
        return None
