"""Tests that described callbacks and loggers cannot write outside the run folder."""

from pathlib import Path

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.training.described import check_callback_places, check_logger, check_logger_places, instantiate_described
from ldm.util import UserError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["dirpath", "logdir", "ckptdir", "cfgdir"])
def test_check_callback_places_keeps_folders_in_the_run(run, tmp_path, name):
    for inside in (run, run / "a" / "b", run / "a" / ".." / "b"):
        check_callback_places({"params": {name: str(inside)}}, run, "lightning.callbacks.a")
    for outside in (tmp_path, run / "..", run / "link", run / "link" / "x", "~", "../x", "s3://b"):
        with pytest.raises(UserError, match=rf"lightning.callbacks.a.params.{name} .*: lies outside"):
            check_callback_places({"params": {name: str(outside)}}, run, "lightning.callbacks.a")


def test_check_callback_places_keeps_file_names_in_the_run(run, tmp_path):
    for inside in ("{epoch:06}-{step:09}", "a/b", "a/../b"):
        check_callback_places({"params": {"filename": inside}}, run, "x")
    for outside in (f"{tmp_path}/x", "../../x", "{epoch}/../../../x", "../link/x"):
        with pytest.raises(UserError, match=r"x.params.filename .*: lies outside"):
            check_callback_places({"params": {"dirpath": str(run / "checkpoints"), "filename": outside}}, run, "x")


def test_check_callback_places_keeps_names_in_every_given_folder(run):
    check_callback_places({"params": {"now": "x", "cfgdir": str(run), "logdir": str(run / "a")}}, run, "x")
    for params in ({"now": "../x", "cfgdir": str(run)}, {"now": "../x", "logdir": str(run / "a"), "cfgdir": str(run)}):
        with pytest.raises(UserError, match=r"x.params.now .*: lies outside"):
            check_callback_places({"params": params}, run, "x")


def test_check_callback_places_ignores_other_values(run):
    for described in (None, 3, {}, {"params": None}, {"params": [1]}, {"params": {"dirpath": None, "monitor": "/a"}}):
        check_callback_places(described, run, "x")
    with pytest.raises(UserError, match="is not a valid path"):
        check_callback_places({"params": {"dirpath": "a\0b"}}, run, "x")


def test_check_logger_places_checks_every_text(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_logger_places({"save_dir": "logs/run", "name": "a", "version": 3, "tags": ["b", {"c": "d/e"}]}, run, "x")
    for outside in ("../x", "/etc", "/../../x", "a/../../x", "link/x"):
        with pytest.raises(UserError, match="lies outside"):
            check_logger_places({"a": ["b", {"c": outside}]}, run, "x")


def test_check_logger_checks_the_built_loggers_folders(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_TEST_PLACE", str(tmp_path))
    check_logger(TensorBoardLogger(str(run), name="a", version=""), run, "x")
    for options in ({"save_dir": str(tmp_path)}, {"save_dir": str(run), "sub_dir": "../../../a"}):
        with pytest.raises(UserError, match=r"x: (save_dir|log_dir) .*: lies outside"):
            check_logger(TensorBoardLogger(**options), run, "x")
    with pytest.raises(UserError, match=r"x: log_dir .*: lies outside"):
        check_logger(TensorBoardLogger("$LDM_TEST_PLACE/a"), Path("$LDM_TEST_PLACE"), "x")


@pytest.mark.parametrize("target", [{"a": 1}, ["os.system"], 3])
def test_instantiate_described_names_what_is_no_target(target):
    with pytest.raises(UserError, match=r"^lightning\.callbacks\.x: target .* is not a dotted path"):
        instantiate_described({"target": target}, "lightning.callbacks.x")
