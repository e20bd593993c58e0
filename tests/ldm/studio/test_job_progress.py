"""Tests of the progress of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.reporting.metrics import Metrics, Series
from ldm.studio.job_progress import Progress, bar_progress, duration, most_steps, run_folder, training_progress
from ldm.studio.job_store import Job

STEPS = "Epoch 0, step 1: loss=0.8, img/s=1\nother\nEpoch 1, step 5: loss=0.5, img/s=4\n"


def test_bar_progress_reads_the_last_bar() -> None:
    text = "10 images\nencoding:  90%|####| 9/10 [00:07<00:01, 3img/s]\na warning\n"
    assert bar_progress(text) == Progress(0.9, "9 of 10, 00:01 left")
    assert bar_progress("encoding:   0%|  | 0/10 [00:00<?, ?img/s]") == Progress(0.0, "0 of 10")
    assert bar_progress("a\nb\n") == Progress(None, "b")
    assert bar_progress("") == Progress(None, "")


def test_training_progress_counts_steps_and_time_left() -> None:
    metrics = Metrics({"device/step_seconds": Series([1, 2], [9.0, 11.0])}, {}, 6)
    found = training_progress(STEPS, 10, metrics, None)
    assert found == Progress(0.6, "step 6 of 10: loss=0.5, img/s=4; about 40 s left")
    assert training_progress(STEPS, None, None, 2) == Progress(None, "step 5: loss=0.5, img/s=4")
    assert training_progress(STEPS, 5, None, 2) == Progress(1.0, "step 5 of 5: loss=0.5, img/s=4")
    assert training_progress("loading\n", 5, None, 2) == Progress(None, "loading")


@pytest.mark.parametrize(("speeds", "left"), [
    ((0.1,), "4 min 10 s"),  # the warm-up alone
    ((0.1, 2.0, 3.0), "10 s"),
    ((0.1, *[0.1] * 30, *[2.5] * 20), "10 s"),  # the newest lines
    ((0.0, 0.0), "50 s"),
])  # fmt: skip
def test_time_left_is_that_of_the_speed_in_the_log(speeds: tuple[float, ...], left: str) -> None:
    metrics = Metrics({"device/step_seconds": Series([1, 2, 3], [99.0, 10.0, 10.0])}, {}, 0)
    log = "".join(f"Epoch 0, step 5: loss=0.5, img/s={speed}, mem=1GiB\n" for speed in speeds)
    assert training_progress(log, 10, metrics, 5).text.endswith(f"; about {left} left")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (65, "1 min 5 s"), (7260, "2 h 1 min"), (-1, "0 s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_run_folder_is_named_by_the_last_command(tmp_path: Path) -> None:
    job = Job(tmp_path, "train", "", [None, None], 0)  # type: ignore[list-item]
    assert run_folder(job) is None
    job.log(1).write_text("x\nRun folder: logs/2026_a b\nmore\n")
    assert run_folder(job) == Path("logs/2026_a b")


def test_most_steps_is_that_of_the_newest_config(tmp_path: Path) -> None:
    assert most_steps(tmp_path) is None
    (tmp_path / "configs").mkdir()
    for time, steps in (("1", 5), ("2", 9)):
        text = f"lightning: {{trainer: {{max_steps: {steps}}}}}"
        (tmp_path / f"configs/2026-01-0{time}T00-00-00-lightning.yaml").write_text(text)
    assert most_steps(tmp_path) == 9
    (tmp_path / "configs/2026-01-03T00-00-00-lightning.yaml").write_text("lightning: {trainer: [")
    assert most_steps(tmp_path) == 9
