"""Tests of main.py and trust: values of the environment, resuming, and the folders that a run writes to."""

from __future__ import annotations

import logging
import shutil
import signal

import pytest
from omegaconf import OmegaConf

from ldm.callbacks.rng import StepSeeds
from ldm.util import UserError
from tests.training_runs import CONFIG, fixture_one_thread, fixture_train, logged, the_run  # noqa: F401

SECRET = "place-nobody-else-may-know"
FROM_ENVIRONMENT = "${oc.env:LDM_TEST_PLACE}"
VALUED = ("images", "tensorboard", "csv", "configs", "checkpoints")


@pytest.fixture
def secret(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_TEST_PLACE", SECRET)


def holding(run, text):
    """Return the files of a run that contain `text`, in their content or name."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.relative_to(run).parts[0] for path in files} >= set(VALUED)
    return [path for path in files if text in str(path.relative_to(run)) or text.encode() in path.read_bytes()]


@pytest.mark.parametrize("typed", [False, True])
def test_a_run_keeps_no_value_of_the_environment(train, tmp_path, secret, typed):
    shutil.copytree(tmp_path / "shards", tmp_path / SECRET)
    urls = f"{FROM_ENVIRONMENT}/s-{{000000..000001}}.tar"
    line = "--max_steps 2 lightning.callbacks.image_logger.params.disabled=False"
    if typed:
        line += f" data.params.training_urls={urls}"
    else:
        config = OmegaConf.merge(CONFIG, {"data": {"params": {"training_urls": urls}}})
        OmegaConf.save(config, tmp_path / "tiny.yaml")
        with pytest.raises(UserError, match=r"tiny\.yaml: .*oc\.env:LDM_TEST_PLACE.* give --trust-config"):
            train(line)
        line += " --trust-config"
    assert train(line) == 0
    run = the_run(tmp_path / "logs")
    assert holding(run, SECRET) == []
    (project,) = (run / "configs").glob("*-project.yaml")
    assert urls in project.read_text()
    with pytest.raises(UserError, match="give --trust-config"):
        train(f"--resume {run} --max_steps 3")
    assert train(f"--resume {run} --max_steps 3 --trust-config") == 0
    assert sorted(logged(run, "train/loss")) == [0, 1, 2] and holding(run, SECRET) == []


def test_a_run_keeps_no_password_that_is_typed(train, tmp_path):
    shards = f"data.params.training_urls=pipe:cat {tmp_path}/shards/s-000000.tar && : --user me:{SECRET}"
    line = "--max_steps 2 lightning.callbacks.image_logger.params.disabled=False"
    line += f" data.params.null_cond_path={tmp_path}/shards/null.t5.npy"
    assert train([*line.split(), shards]) == 0
    run = the_run(tmp_path / "logs")
    assert holding(run, SECRET) == []
    with pytest.raises(UserError, match=r"^data\.params\.training_urls: the run has not saved its password; type "):
        train(f"--resume {run} --max_steps 3 --trust-config")
    assert train([*f"--resume {run} --max_steps 3".split(), shards]) == 0
    assert sorted(logged(run, "train/loss")) == [0, 1, 2] and holding(run, SECRET) == []


def test_the_command_to_resume_names_trust_config_if_needed(train, tmp_path, secret, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    begin = StepSeeds.on_train_batch_start

    def interrupted(self, trainer, *arguments):
        begin(self, trainer, *arguments)
        if trainer.global_step == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepSeeds, "on_train_batch_start", interrupted)
    assert train("-l plain --max_steps 9 data.params.shuffle_buffer=7") == 0
    assert " -t\n" in caplog.text and "--trust-config" not in caplog.text
    monkeypatch.setenv("SEED", "3")
    train("--max_steps 9 data.params.seed=${oc.decode:${oc.env:SEED}}")
    assert " -t --trust-config\n" in caplog.text


def test_paths_on_the_command_line_must_lie_in_the_run_folder(train, tmp_path):
    for line in (
        f"lightning.logger.params.save_dir={tmp_path}",
        f"lightning.modelcheckpoint.params.filename={tmp_path}/x lightning.modelcheckpoint.params.save_top_k=1",
        "--name ../x",
        "--postfix a/b",
    ):
        with pytest.raises(UserError, match=r"lies outside|becomes part of a folder name"):
            train(f"--max_steps 1 {line}")
    assert not (tmp_path / "logs").exists()
