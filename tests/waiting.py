"""Waiting for other processes: until a condition holds or the process that should fulfil it has died.

Every test waits up to `LIMIT`. It ends a test that hangs, and is no bound on speed.
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
    """Return True if a process, of `subprocess` or `multiprocessing`, has ended."""
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
    """Wait for the end of `processes` of `multiprocessing`; return their exit codes."""
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode is not None, f"{process} did not end"
    return [process.exitcode for process in processes]


def collect(results: Any, processes: Sequence[Any]) -> list[Any]:
    """Return the results of `processes` from the queue `results`, one each, in order of arrival."""
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
