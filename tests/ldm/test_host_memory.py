"""Test that freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
