"""Jobs: commands that run one after the other, apart from the studio, with a log file. Imports no torch.

A job has a folder with `job.json` (its commands), `state.json` (written by its runner, see `ldm.studio.runner`) and a
log per command. Everything that the studio knows about a job is read from there, so that a new studio finds the jobs
of an earlier one. A process is known by its id and its start time.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.files import atomic_write, read_at_most
from ldm.locks import is_running, process_start
from ldm.studio.commands import ROOT, Step
from ldm.util import UserError, refuse_if

JOB, STATE, STOP, RUNNER = "job.json", "state.json", "stop", "runner.json"
RUNNING, FINISHED, STOPPED, FAILED, KILLED = "running", "finished", "stopped", "failed", "killed"
PASSWORD = "LDM_STUDIO_PASSWORD"  # environment variable that no command gets
_MOST_BYTES = 1 << 20  # size limit of a JSON file
_SECONDS_TO_START = 10.0  # in which a studio notes the runner that it has started
_TAIL = 1 << 16  # bytes at the end of a log that are read
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Job:
    """Job as it was started. `kind` is the part of the page that started it; `about` has values for its result."""

    folder: Path
    kind: str
    title: str
    steps: list[Step]
    started: float  # seconds since the epoch
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    def log(self, step: int) -> Path:
        """Return the path of the log of the command number `step`."""
        return self.folder / f"log-{step}.txt"


@dataclass(frozen=True)
class JobState:
    """State of a job: one of the constants above, the number of the present step, and the exit codes so far."""

    status: str
    step: int
    codes: list[int]
    times: list[float]  # start of each step so far, and the end of the last, in seconds since the epoch
    child: tuple[int, int | None] | None = None  # id and start time of the running command
    is_stopping: bool = False  # it was asked to stop, and still runs

    @property
    def is_running(self) -> bool:
        return self.status == RUNNING


class JobStore:
    """Store of jobs, each in a folder of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runners: list[subprocess.Popen[bytes]] = []

    def start(self, kind: str, title: str, steps: Sequence[Step], about: Mapping[str, Any] | None = None) -> Job:
        """Start the commands `steps`, detached from this process, and return the job.

        Raises:
            UserError: a job of this kind is running.
        """
        self.check_none_runs(kind)
        started = time.time()
        name = f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{kind}-{secrets.token_hex(2)}"
        job = Job(self.folder / name, kind, title, list(steps), started, about or {})
        words = [{"title": step.title, "words": step.words} for step in steps]
        _write_json(job.folder / JOB, {"kind": kind, "title": title, "steps": words, "started": started,
                                       "about": dict(job.about)})  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != PASSWORD}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        line = [sys.executable, "-m", "ldm.studio.runner", str(job.folder.absolute())]
        with (job.folder / "runner.txt").open("ab") as log:
            runner = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._runners.append(runner)
        _write_json(job.folder / RUNNER, {"process": [runner.pid, process_start(runner.pid)]})
        return job

    def list(self, kind: str | None = None) -> list[Job]:
        """Return the jobs, of one `kind` if it is given, the newest first. Damaged ones are left out."""
        return list(self._read(kind))

    def _read(self, kind: str | None) -> Iterator[Job]:
        """Yield what `list` returns. The page asks for the newest again and again, so no file more is read."""
        for path in sorted(self.folder.glob(f"*-{kind}-*/{JOB}" if kind else f"*/{JOB}"), reverse=True):
            with suppress(OSError, ValueError, KeyError, TypeError):
                job = read_job(path.parent)
                if kind in (None, job.kind):
                    yield job

    def newest(self, kind: str) -> Job | None:
        """Return the newest job of `kind`, or None."""
        return next(self._read(kind), None)

    def running(self, kind: str) -> Job | None:
        """Return the newest running job of `kind`, or None."""
        return next((job for job in self._read(kind) if self.state(job).is_running), None)

    def check_none_runs(self, kind: str) -> None:
        """Raise `UserError` if a job of `kind` is running."""
        job = self.running(kind)
        if job is not None:
            raise UserError(f"{job.title}: is running; wait for its end, or stop it")

    def state(self, job: Job) -> JobState:
        """Return the present state of `job`."""
        for runner in self._runners:
            runner.poll()  # an ended runner is no zombie then
        return read_state(job)

    def stop(self, job: Job) -> None:
        """Interrupt the running command of `job` as Ctrl-C does, and start no further one."""
        (job.folder / STOP).touch()
        self._signal(job, signal.SIGINT)

    def save_now(self, job: Job) -> None:
        """Ask the running training of `job` to write its checkpoint and go on.

        Raises:
            UserError: no command runs, or it does not take the signal yet, which would end it.
        """
        state = self.state(job)
        refuse_if(
            state.child is None or not takes_signal(state.child[0], signal.SIGUSR1),
            "save now: no training can save now; if it has just begun, wait for its first step",
        )
        self._signal(job, signal.SIGUSR1)

    def _signal(self, job: Job, number: signal.Signals) -> None:
        child = self.state(job).child
        if child is not None and is_alive(*child):
            with suppress(ProcessLookupError):
                os.kill(child[0], number)


def read_job(folder: Path) -> Job:
    """Return the job in `folder`. Raises OSError, ValueError, KeyError or TypeError if its file is damaged."""
    content = json.loads(read_at_most(folder / JOB, _MOST_BYTES))
    steps = [Step(str(step["title"]), tuple(map(str, step["words"]))) for step in content["steps"]]
    about = content["about"]
    if not isinstance(about, dict):
        raise TypeError("about is no mapping")
    return Job(folder, str(content["kind"]), str(content["title"]), steps, float(content["started"]), about)


def read_state(job: Job) -> JobState:
    """Return the state of `job` from its files and the running processes."""
    try:
        content = json.loads(read_at_most(job.folder / STATE, _MOST_BYTES))
        runner, child = _process(content["runner"]), _process(content["child"])
        step, codes, times = int(content["step"]), list(map(int, content["codes"])), list(map(float, content["times"]))
    except (OSError, ValueError, KeyError, TypeError):
        return JobState(RUNNING if _begins(job) else KILLED, 0, [], [])
    is_stopped = (job.folder / STOP).exists()
    child = child if child is not None and is_alive(*child) else None
    if content.get("ended") is True:
        failed = next((code for code in codes if code), 0)
        # A training that was asked to stop ends with code 0.
        status = STOPPED if is_stopped else FAILED if failed else FINISHED
        return JobState(status, step, codes, times)
    if child is not None or (runner is not None and is_alive(*runner)):
        return JobState(RUNNING, step, codes, times, child, is_stopped)
    return JobState(KILLED, step, codes, times)


def _begins(job: Job) -> bool:
    """Return True if the runner of `job` is alive, or if `job` was started a few seconds ago."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        runner = _process(json.loads(read_at_most(job.folder / RUNNER, _MOST_BYTES))["process"])
        return runner is not None and is_alive(*runner)
    return time.time() - job.started < _SECONDS_TO_START


def _process(value: Any) -> tuple[int, int | None] | None:
    return None if value is None else (int(value[0]), None if value[1] is None else int(value[1]))


def is_alive(process: int, start: int | None) -> bool:
    """Return True if the process with this id and start time runs. One that ended and waits for its parent does not."""
    if not is_running(process, start):
        return False
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    return True


def takes_signal(process: int, number: signal.Signals) -> bool:
    """Return True if the process has a handler of the signal `number`, so that the signal does not end it."""
    with suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{process}/status").read_text()
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)
    return False


def read_log(job: Job, step: int) -> str:
    """Return the end of the log of the command number `step`. A progress bar is one line, in its last state."""
    try:
        with job.log(step).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in _ESCAPES.sub("", text).split("\n"))
    return "\n".join(lines)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
