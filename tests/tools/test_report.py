from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from ldm.reporting.run_folder import PARTS
from tests.conftest import ROOT
from tests.run_folders import write_run
from tests.training_runs import SAMPLES, fixture_one_thread, fixture_train, logged, the_run  # noqa: F401

TOOL = ROOT / "tools/report.py"


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the report at the end of a run take any time, so that its samples depend on no machine."""
    monkeypatch.setattr("ldm.reporting.report_file._SECONDS_AT_END", math.inf)


def test_report_of_a_training_with_its_samples(train, tmp_path: Path, run_tool, endless: None) -> None:
    one_band = "data.params.val_urls=shards/s-000001.tar lightning.callbacks.timestep_losses.params.bands=1"
    assert train(f"--max_steps 3 --val_check_interval 3 lightning.report=true {one_band}") == 0
    run = the_run(tmp_path / "logs")
    assert {2: pytest.approx(float(logged(run, "val/loss_simple")[2]), rel=1e-5)} == {
        step: float(loss) for step, loss in logged(run, "val/loss_t0_49").items()
    }
    page = (run / "report.html").read_text()
    assert "finished" in page and "python main.py -b tiny.yaml -t --no-test --max_steps 3" in page
    assert "Loss by band of timesteps" in page
    assert page.count('alt=""') == SAMPLES and "Captions: median" in page
    assert train(f"--resume {run} --max_steps 5 lightning.report=true") == 0
    assert run_tool(TOOL, run, "--samples", 2) is None
    page = (run / "report.html").read_text()
    assert page.count("<td>start</td>") == page.count("<td>end</td>") == 2
    assert page.count('alt=""') == 2  # the decoded samples
    assert "Loss by band of timesteps" in page and "Captions: median" in page
    assert (run / "report.html").stat().st_size < 1 << 20


def test_report_at_the_end_leaves_out_samples_that_take_too_long(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ldm.reporting.report_file._SECONDS_AT_END", 0.0)
    assert train("--max_steps 1 lightning.report=true") == 0
    page = (the_run(tmp_path / "logs") / "report.html").read_text()
    assert "Captions: median" in page and "No samples are shown" in page and 'alt=""' not in page


def test_no_report_if_it_is_turned_off(train, tmp_path: Path) -> None:
    assert train("--max_steps 1") == 0
    run = the_run(tmp_path / "logs")
    assert not (run / "report.html").exists() and (run / "events.jsonl").exists()


def test_a_report_that_fails_does_not_fail_the_run(train, tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("ldm.reporting.page.write_page", fail)
    assert train("--max_steps 1 lightning.report=true") == 0
    assert "No report: a defect" in caplog.text


def test_report_of_a_run_that_ends_by_an_error(train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss nan"):
        train("--max_steps 4 model.base_learning_rate=1e30 lightning.report=true")
    page = (the_run(tmp_path / "logs") / "report.html").read_text()
    assert "ended by an error" in page
    assert re.search(r'<tr class="fault">.*loss nan', page)


def test_report_compares_runs(tmp_path: Path, run_tool) -> None:
    one, other = write_run(tmp_path / "logs/one"), write_run(tmp_path / "logs/other")
    assert run_tool(TOOL, one, other) is None
    assert "Comparison of 2 runs" in (tmp_path / "logs/comparison.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "error: none: no such run folder; give logs/<time>_<name>"),
        (["run", "run"], "error: run: given twice; name each run once"),
        (["run", "--out", "page.txt"], "error: --out page.txt: the name must end in .html"),
        (["run", "--samples", "-1"], "error: --samples -1: give a whole number of at least 0"),
        (
            ["file"],
            f"error: file: not a run folder, which has {', '.join(PARTS)}; give logs/<time>_<name>",
        ),
        (["run", "--out", "folder.html"], "error: folder.html: a folder; name a file in it"),
    ],
)
def test_report_refuses_in_one_line(tmp_path: Path, run_tool, monkeypatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    assert run_tool(TOOL, *words) == message
