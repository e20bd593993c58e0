"""Tests of the memory that is available, and of freed memory that stays with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ldm import host_memory
from ldm.host_memory import available_memory

ALLOCATE_AGAIN_AND_AGAIN = """
import resource, torch
from ldm.host_memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 24) for _ in range(4)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    """Return the page faults of allocating four tensors of 64 MiB after as many were freed."""
    program = ALLOCATE_AGAIN_AND_AGAIN.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    assert page_faults(keep=True) * 10 < page_faults(keep=False)


MACHINE = 8 << 20
CONTAINER = {"memory.max": "9000\n", "memory.current": "5000\n", "memory.stat": "anon 1\ninactive_file 300\n"}
VERSION_1 = {
    "memory.limit_in_bytes": "900\n",
    "memory.usage_in_bytes": "500\n",
    "memory.stat": "total_inactive_file 30\n",
}


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        (None, {}, MACHINE),
        ("0::/\n", {"": CONTAINER | {"memory.max": "max\n"}}, MACHINE),
        ("0::/\n", {"": CONTAINER}, 4300),
        ("0::/\n", {"": {"memory.max": "9000\n"}}, MACHINE),
        ("0::/slurm/job_1/step_0\n", {"slurm/job_1": CONTAINER, "slurm/job_1/step_0": {}}, 4300),
        ("0::/slurm/job_1\n", {"slurm": CONTAINER, "slurm/job_1": CONTAINER | {"memory.max": "7000\n"}}, 2300),
        ("0::/../outside\n", {"": CONTAINER}, 4300),
        ("9:cpu:/a\n4:memory:/a/b\n0::/\n", {"memory/a": VERSION_1, "cpu/a": CONTAINER}, 430),
        ("4:memory:/docker/abc\n0::/\n", {"memory": VERSION_1}, 430),
        ("0::/\n", {"": CONTAINER | {"memory.max": "4000\n"}}, 0),
    ],
    ids=[
        "no groups",
        "a container without a limit",
        "a container",
        "files of another kind",
        "a batch job",
        "the least of two limits",
        "a group outside the container",
        "version 1",
        "version 1 in a container",
        "more used than the limit",
    ],
)
def test_available_memory(own, groups: dict, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16384 kB\nMemAvailable:    8192 kB\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    for group, files in groups.items():
        folder = tmp_path / "groups" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    for name, path in {"_MEMORY": "meminfo", "_OWN_GROUPS": "own", "_GROUPS": "groups"}.items():
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    assert available_memory() == expected
    monkeypatch.setattr(host_memory, "_MEMORY", tmp_path / "missing")
    assert available_memory() is None
