"""Tests of the default paths of the commands."""

import os
from pathlib import Path

import pytest

from ldm.cli.paths import check_release, newest_checkpoint
from ldm.release import CONVENTIONAL_RELEASE
from ldm.util import UserError


def written(run: Path, time: int = 1000) -> Path:
    path = run / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time, time))
    return path


@pytest.mark.parametrize("name", ["2026-01-02T00-00-00_cats", "2026-01-02T00-00-00_a/b", "2026-01-02T00-00-00_a/b/c"])
def test_newest_checkpoint_finds_runs_at_any_depth(name, tmp_path):
    written(tmp_path / "2026-01-01T00-00-00_old", 2000)
    assert newest_checkpoint(tmp_path) != written(tmp_path / name, 1000)
    os.utime(tmp_path / name / "checkpoints" / "last.ckpt", (3000, 3000))
    assert newest_checkpoint(tmp_path) == tmp_path / name / "checkpoints" / "last.ckpt"


def test_newest_checkpoint_at_equal_times_is_of_the_run_that_started_last(tmp_path):
    for stamp in ("03", "01", "04", "02"):
        written(tmp_path / f"2026-01-{stamp}T00-00-00_cats")
    assert newest_checkpoint(tmp_path).parts[-3] == "2026-01-04T00-00-00_cats"


def test_newest_checkpoint_follows_links_and_stops_at_loops(tmp_path):
    elsewhere, logs = tmp_path / "disk", tmp_path / "logs"
    path = written(elsewhere / "2026-01-01T00-00-00_a" / "b")
    logs.symlink_to(elsewhere, target_is_directory=True)
    assert newest_checkpoint(logs).samefile(path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "2026").symlink_to(elsewhere / "2026-01-01T00-00-00_a", target_is_directory=True)
    (elsewhere / "2026-01-01T00-00-00_a" / "loop").symlink_to(elsewhere, target_is_directory=True)
    assert newest_checkpoint(other).samefile(path)


def test_newest_checkpoint_names_the_searched_folder(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no run with checkpoints/last\.ckpt in .*--train-ckpt"):
        newest_checkpoint(tmp_path)


def test_check_release_names_the_option_of_a_missing_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"models/ldm/.*: no such file; it is the default of --ckpt, so name your"):
        check_release("--ckpt", CONVENTIONAL_RELEASE)
    check_release("--ckpt", tmp_path / "mine.ckpt")  # the reader names this one
    CONVENTIONAL_RELEASE.parent.mkdir(parents=True)
    CONVENTIONAL_RELEASE.touch()
    check_release("--ckpt", CONVENTIONAL_RELEASE)
