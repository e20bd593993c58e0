"""Host memory: how much is available, and freed memory that is kept for the next step or returned to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Parameters of mallopt(3) in glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_MEMORY, _OWN_GROUPS, _GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Files of a control group, and an entry of its memory.stat: limit, use, cache that the kernel can drop.
_NAMES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
          2: ("memory.max", "memory.current", "inactive_file")}  # fmt: skip


def available_memory() -> int | None:
    """Return the bytes of host memory that this process can still take; None where the system does not tell.

    This is the least of the machine's (proc(5), MemAvailable) and of what is left to each control group of the process
    (cgroups(7)), as a container or a batch system such as Slurm makes one.
    """
    try:
        lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
        available = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([available, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left to each control group that contains this process and has a limit."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, _GROUPS / "memory") if controllers else (2, _GROUPS)
        folder = root / own.lstrip("/")  # missing in a container that has its own as root
        for group in (folder, *folder.parents):
            if (left := _left_in(group, *_NAMES[version])) is not None:
                yield left
            if group == root:
                break


def _left_in(group: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        most, now = (int((group / name).read_text()) for name in (limit, used))
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - now + int(entries[cache])
    except (OSError, KeyError, ValueError):  # no such group, or one without a limit, "max"
        return None


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
