"""What the tab of the training shows of a run that begins."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ldm.cli.paths import LOGS
from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.commands import Step
from ldm.studio.job_panel import JobView
from ldm.studio.job_store import RUNNING, Job, JobState
from ldm.studio.runs import view_run
from ldm.studio.thumbnails import Thumbnails
from ldm.studio.train_tab import training_results
from tests.run_folders import write_run


def test_training_results_choose_a_run_as_soon_as_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thumbnails = Thumbnails(tmp_path / "thumbnails", AllowedFolders([tmp_path]))
    folder = LOGS / "2026-01-02T03-04-05_cats"
    job = Job(tmp_path / "job", "train", "Train cats", [Step("Train", ("main.py",))], time.time())

    def results(drawn: object) -> list:
        state = JobState(RUNNING, 0, [], [job.started])
        return training_results(JobView(job, state, "", view_run(thumbnails, folder)), drawn)

    folder.mkdir(parents=True)  # its log names the folder, which has no parts yet
    drawn, *_, chosen = results(None)
    assert chosen["choices"] == [] and "value" not in chosen
    (folder / "checkpoints").mkdir()
    drawn, *_, chosen = results(drawn)
    assert (chosen["choices"], chosen["value"]) == ([folder.name], folder.name)
    write_run(folder)  # its first values: another run that the user has chosen stays
    drawn, *_, chosen = results(drawn)
    assert "value" not in chosen
    assert results(drawn)[0].get("__type__") == "update"  # nothing new: skipped
