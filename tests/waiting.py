"""Waiting for other processes: until the thing appears or the process that should bring it has died.

No test waits for less than `LIMIT`, which is there for a test that hangs, and says nothing about speed.
"""

from __future__ import annotations

import queue
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

LIMIT = 1200.0  # seconds; see the timeout in pyproject.toml, which is longer
_POLL = 0.02


def has_ended(process: Any) -> bool:
    """Return whether a process, of `subprocess` or `multiprocessing`, has ended."""
    return process.poll() is not None if isinstance(process, subprocess.Popen) else not process.is_alive()


def wait_for(condition: Callable[[], Any], *processes: Any) -> Any:
    """Return the first true value of `condition`; fail as soon as one of `processes` has ended without it."""
    end = time.monotonic() + LIMIT
    while True:
        ended = [process for process in processes if has_ended(process)]  # before the last look
        if found := condition():
            return found
        assert not ended, f"a process ended before what was waited for: {ended}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(_POLL)


def join(*processes: Any) -> list[int]:
    """Wait for the end of `processes` of `multiprocessing`; returns their exit codes."""
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode is not None, f"{process} did not end"
    return [process.exitcode for process in processes]


def collect(results: Any, processes: Sequence[Any]) -> list[Any]:
    """Return what each of `processes` puts into the queue `results`, in the order in which it arrives."""
    found: list[Any] = []

    def take() -> bool:
        try:
            while len(found) < len(processes):
                found.append(results.get(timeout=_POLL))
        except queue.Empty:
            pass
        return len(found) == len(processes)

    end = time.monotonic() + LIMIT
    while True:
        ended = all(has_ended(process) for process in processes)
        failed = [process for process in processes if has_ended(process) and process.exitcode]
        if take():
            return found
        assert not ended and not failed, f"ended without a result: {failed or processes}"
        assert time.monotonic() < end, "waited in vain"
