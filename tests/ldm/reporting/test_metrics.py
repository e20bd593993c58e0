from __future__ import annotations

from pathlib import Path

import pytest

from ldm.reporting.metrics import read_metrics
from tests.run_folders import METRICS, write_metrics


def test_read_metrics_returns_the_values_of_the_csv(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, METRICS)
    problems: list[str] = []
    metrics = read_metrics(tmp_path, problems)
    assert metrics.series["train/loss_simple"] == ([0, 1, 2], [0.75, 0.5, 0.4321])
    assert metrics.series["val/loss_simple"] == ([0, 2], [0.9, 0.8125])
    assert metrics.series["val/loss_simple"].last == (2, 0.8125)
    assert (metrics.steps, problems) == (3, [])


def test_read_metrics_replaces_steps_that_a_resumed_run_repeated(tmp_path: Path) -> None:
    for version, values in ((2, {0: (1.0, None), 5: (2.0, None), 9: (3.0, None)}), (10, {5: (4.0, None)})):
        write_metrics(tmp_path, version, values)
    assert read_metrics(tmp_path, []).series["train/loss_simple"] == ([0, 5], [1.0, 4.0])


def test_read_metrics_keeps_the_values_if_the_last_start_has_none(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, METRICS)
    before = read_metrics(tmp_path, [])
    for version, text in ((1, ""), (2, "epoch,step,train/loss_simple\n"), (3, "epoch,step\n0,0\n")):
        path = write_metrics(tmp_path, version, {})
        path.write_text(text)
        assert read_metrics(tmp_path, []) == before


def test_read_metrics_keeps_the_validation_before_a_resume(tmp_path: Path) -> None:
    """Validation after 2 steps comes before the loss of the step with the number 2."""
    write_metrics(tmp_path, 0, {1: (1.0, None), 2: (9.0, 0.5), 3: (9.0, None)})
    write_metrics(tmp_path, 1, {2: (3.0, None), 4: (4.0, 0.25)})
    series = read_metrics(tmp_path, []).series
    assert series["train/loss_simple"] == ([1, 2, 4], [1.0, 3.0, 4.0])
    assert series["val/loss_simple"] == ([2, 4], [0.5, 0.25])


def test_read_metrics_leaves_out_damaged_lines(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, 0, METRICS)
    path.write_text(path.read_text() + "0,x,0.1,\n0,3,0.\0,\n0,4")
    problems: list[str] = []
    assert read_metrics(tmp_path, problems).series["train/loss_simple"].steps == [0, 1, 2]
    assert problems == ["csv/version_0/metrics.csv: 3 damaged lines left out"]


@pytest.mark.parametrize("line", ["0,1,2\r0,3,4\r", f"0,1,{'9' * 200_000}\n", f"0,1{'0' * 400},2,\n"])
def test_read_metrics_leaves_out_lines_that_no_csv_has(tmp_path: Path, line: str) -> None:
    path = write_metrics(tmp_path, 0, METRICS)
    with path.open("a", newline="") as file:
        file.write(line)
    problems: list[str] = []
    assert read_metrics(tmp_path, problems).series["train/loss_simple"].steps == [0, 1, 2]
    assert len(problems) == 1 and "damaged line" in problems[0]


def test_read_metrics_without_steps(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, 0, METRICS)
    path.write_text("a,b\n1,2\n")
    assert read_metrics(tmp_path, []).series == {}


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e308])
def test_read_metrics_names_steps_that_are_not_finite(tmp_path: Path, value: float) -> None:
    write_metrics(tmp_path, 0, {0: (1.0, None), 1: (value, None)})
    metrics = read_metrics(tmp_path, [])
    assert metrics.series["train/loss_simple"].steps == [0]
    assert metrics.not_finite == {"train/loss_simple": [1]}
