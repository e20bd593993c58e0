"""Studio as a process of its own, its jobs, and waiting for what its page shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Locator, Page
from playwright.sync_api import TimeoutError as NotYet

from ldm.studio.job_store import JobStore, is_alive
from tests.conftest import ROOT
from tests.waiting import LIMIT, wait_for

WORK = Path("outputs/studio")  # the default of --work
_LOOK = 2000  # milliseconds between two looks at the process
_DEAD = ("failed", "killed")


class StudioProcess:
    """Studio in the working directory `folder`, at `address`."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], address: str) -> None:
        self.folder, self.process, self.address = folder, process, address

    @property
    def jobs(self) -> JobStore:
        return JobStore(self.folder / WORK / "jobs")

    def wait(self, awaited: Locator) -> None:
        """Wait until `awaited` is visible. Fail as soon as the studio has ended."""
        end = time.monotonic() + LIMIT
        while True:
            has_ended = self.process.poll() is not None  # before the last look
            with suppress(NotYet):
                awaited.first.wait_for(timeout=_LOOK)
                return
            assert not has_ended, "the studio has ended"
            assert time.monotonic() < end, f"waited in vain for {awaited}"

    def wait_for_state(self, page: Page, kind: str, state: str, text: str = "") -> Locator:
        """Wait until the status of the newest job of `kind` is `state` and contains `text`, and return the status.

        Fail as soon as the job has failed or was killed, with its log.
        """
        status = page.locator(f"#{kind}-status")
        awaited = status.filter(has=page.locator(f"[data-state={state}]"), has_text=text)
        dead = status.filter(has=page.locator(", ".join(f"[data-state={one}]" for one in _DEAD if one != state)))
        self.wait(awaited.or_(dead))
        assert not dead.count(), self._end_of(kind)
        return status

    def _end_of(self, kind: str) -> str:
        job = self.jobs.newest(kind)
        return "no job" if job is None else job.log(self.jobs.state(job).step).read_text(errors="replace")[-3000:]

    def end_jobs(self) -> None:
        """Kill the jobs that are still running. They do not end with the studio."""
        for job in self.jobs.list():
            state = self.jobs.state(job)
            if state.is_running:
                self.jobs.stop(job)  # no further command starts
                if state.child is not None and is_alive(*state.child):
                    with suppress(ProcessLookupError):
                        os.kill(state.child[0], signal.SIGKILL)
                wait_for(lambda job=job: not self.jobs.state(job).is_running)


@contextmanager
def running_studio(folder: Path, *options: str, checkout: Path = ROOT) -> Iterator[StudioProcess]:
    """Run `tools/studio.py` of a `checkout` with `options` in `folder`, at a free port."""
    line = [sys.executable, checkout / "tools/studio.py", "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log = folder / "studio.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            line, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )

    def address() -> str:
        lines = [line for line in log.read_text().splitlines() if line.startswith("studio: http")]
        return lines[0].removeprefix("studio: ") if lines else ""

    try:
        studio = StudioProcess(folder, process, wait_for(address, process))
        try:
            yield studio
        finally:
            studio.end_jobs()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT)
