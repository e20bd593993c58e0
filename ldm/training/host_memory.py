"""Allocation of host memory for a training that computes or keeps state on the host."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3) in glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next step. Return False if the C library is not glibc.

    By default, glibc returns the pages of a large tensor to the kernel as soon as it is freed. The kernel must then
    zero the pages of the next tensor. On a CPU, this takes a third of a step of Stable Diffusion's UNet
    (benchmarks/RESULTS.md). With this setting, the process keeps its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])
