from __future__ import annotations

from pathlib import Path

import pytest

from ldm.reporting.evaluations import read_evaluations
from tests.run_folders import write_evaluation


def test_read_evaluations_prefers_the_run_to_its_neighbours(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "configs").mkdir(parents=True)
    (tmp_path / "other/configs").mkdir(parents=True)
    write_evaluation(tmp_path / "other/evaluation.json", "of another run")
    assert read_evaluations(run, []) == []
    write_evaluation(tmp_path / "evaluation/evaluation.json", "beside")
    assert [part.sets[0].name for part in read_evaluations(run, [])] == ["beside"]
    write_evaluation(run / "evaluation/evaluation.json", "inside")
    [evaluation] = read_evaluations(run, [])
    [found] = evaluation.sets
    assert (found.name, found.images, found.loss_base, found.loss_tuned) == ("inside", 7, 0.25, 0.125)
    assert (found.ratio, found.timesteps, found.drift_at) == ("0.5", [62, 187], [0.0625, 0.0625])


@pytest.mark.parametrize(
    ("old", "new"), [("7", "Infinity"), ("62", f"1{'0' * 400}"), ("62", "-1"), ("0.25", f"1{'0' * 400}")]
)
def test_read_evaluations_lists_numbers_that_no_figure_holds(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path)
    path.write_text(path.read_text().replace(f": {old},", f": {new},"))
    problems: list[str] = []
    assert read_evaluations(tmp_path, problems) == []
    assert len(problems) == 1 and str(path) in problems[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"sets": {"a": {}}}', "\0", '{"sets": 1}'])
def test_read_evaluations_lists_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    problems: list[str] = []
    assert read_evaluations(tmp_path, problems) == []
    assert len(problems) == 1 and str(tmp_path / "evaluation.json") in problems[0]
