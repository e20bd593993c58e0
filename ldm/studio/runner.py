"""Runner of a job, a process of its own: `python -m ldm.studio.runner FOLDER`. Imports no torch.

It runs the commands of the job one after the other, until one fails or the file `stop` appears, and writes its state.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.files import atomic_write
from ldm.locks import process_start
from ldm.studio.job_store import STATE, STOP, read_job


def run_job(folder: Path) -> None:
    """Run the commands of the job in `folder`, in the working directory."""
    job = read_job(folder)
    state: dict[str, Any] = {"runner": _own(os.getpid()), "child": None, "step": 0, "codes": [], "times": []}
    for number, step in enumerate(job.steps):
        if (folder / STOP).exists():
            break
        state["step"] = number
        state["times"].append(time.time())
        state["codes"].append(_run(folder, step.words, state, job.log(number)))
        state["child"] = None
        _write(folder, state)
        if state["codes"][-1]:
            break
    state["times"].append(time.time())
    _write(folder, {**state, "ended": True})


def _run(folder: Path, words: Sequence[str], state: dict[str, Any], log: Path) -> int:
    """Run a command, and return its exit code, or the negative number of the signal that ended it."""
    line = [sys.executable, *words]
    with (
        log.open("wb") as output,
        subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as child,
    ):
        state["child"] = _own(child.pid)
        _write(folder, state)
        if (folder / STOP).exists():  # it appeared before the studio could know the process
            child.send_signal(signal.SIGINT)
        return child.wait()


def _own(process: int) -> list[int | None]:
    return [process, process_start(process)]


def _write(folder: Path, state: dict[str, Any]) -> None:
    with atomic_write(folder / STATE) as temporary:
        temporary.write_text(json.dumps(state), encoding="utf-8")


if __name__ == "__main__":
    # A shell script starts a background process with SIGINT ignored, and commands would inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_job(Path(sys.argv[1]))
