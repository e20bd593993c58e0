"""Progress of a job's commands, read from their logs and from the run folder. Imports no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ldm.reporting.metrics import Metrics, Series
from ldm.reporting.settings import merged_config
from ldm.studio.job_store import Job, JobState
from ldm.util import UserError

_PERCENT = re.compile(r"(\d{1,3})%\|.*?\| (\d+)/(\d+) \[[\d:]+<([\d:?]+)")  # of tqdm
_STEP = re.compile(r"^Epoch \d+, step (\d+): (.*)$", re.MULTILINE)
_RUN = re.compile(r"^Run folder: (.+)$", re.MULTILINE)
_HEAD = 1 << 16  # bytes at the beginning of a log that name the run folder
_SPEED = re.compile(r"\bimg/s=([\d.]+)")
_MEAN_OF = 20  # newest log lines or epochs whose speed is averaged


@dataclass(frozen=True)
class Progress:
    """Progress of a command: the part that is done, from 0 to 1, and a line about it. None for an unknown part."""

    part: float | None
    text: str


def bar_progress(log: str) -> Progress:
    """Return the progress that the last bar in a log shows, or else its last line."""
    lines = log.strip().splitlines()
    found = next((match for line in reversed(lines) if (match := _PERCENT.search(line))), None)
    if found is None:
        return Progress(None, lines[-1] if lines else "")
    left = "" if "?" in found[4] else f", {found[4]} left"
    return Progress(int(found[1]) / 100, f"{found[2]} of {found[3]}{left}")


def training_progress(log: str, most: int | None, metrics: Metrics | None, images: int | None) -> Progress:
    """Return the progress of a training with `most` optimizer steps of `images`, from its log and its metrics."""
    found = list(_STEP.finditer(log))
    step = max([int(match[1]) for match in found] + ([metrics.steps] if metrics else []), default=0)
    if not step:
        lines = log.strip().splitlines()
        return Progress(None, lines[-1] if lines else "")
    text = f"step {step}" + (f" of {most}" if most else "") + (f": {found[-1][2]}" if found else "")
    epochs = metrics.series.get("device/step_seconds") if metrics else None
    seconds = _logged_seconds([match[2] for match in found], images) or _epoch_seconds(epochs)
    if most and seconds and step < most:
        text += f"; about {duration((most - step) * seconds)} left"
    return Progress(min(step / most, 1.0) if most else None, text)


def _logged_seconds(lines: Sequence[str], images: int | None) -> float | None:
    """Return the seconds of a step of `images` by the speeds in log lines, which are at equal distances of time.

    The first line has the time of the warm-up.
    """
    speeds = [float(match[1]) for line in lines if (match := _SPEED.search(line))]
    newest = (speeds[1:] or speeds)[-_MEAN_OF:]
    return images * len(newest) / sum(newest) if images and sum(newest) else None


def _epoch_seconds(series: Series | None) -> float | None:
    """Return the typical seconds of a step by the means of epochs."""
    return median(series.values[-_MEAN_OF:]) if series else None


def duration(seconds: float) -> str:
    """Return a time in words: `65` → `1 min 5 s`."""
    whole = max(round(seconds), 0)
    hours, minutes, seconds = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def elapsed(state: JobState) -> float:
    """Return the seconds from the start of a job to its end, or to now."""
    if not state.times:
        return 0.0
    return (time.time() if state.is_running else state.times[-1]) - state.times[0]


def run_folder(job: Job) -> Path | None:
    """Return the run folder that the last command of `job` has named in its log, or None."""
    with suppress(OSError, UserError):
        with job.log(len(job.steps) - 1).open("rb") as file:
            found = _RUN.search(file.read(_HEAD).decode("utf-8", errors="replace"))
        return Path(found[1]) if found else None
    return None


def most_steps(run: Path) -> int | None:
    """Return the optimizer steps of the whole training in the folder `run`, or None if they are unknown."""
    value: Any = None
    with suppress(UserError, OSError):
        config = merged_config(sorted(run.glob("configs/*.yaml")), [])
        value = (config.get("lightning") or {}).get("trainer", {}).get("max_steps")
    return value if isinstance(value, int) and value > 0 else None
