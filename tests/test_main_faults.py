"""Tests of faults while main.py trains: those that training survives, and the state saved for the others."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from PIL import Image

from ldm.util import UserError
from tests.conftest import ROOT
from tests.training_runs import (  # noqa: F401
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
    write_inputs,
)
from tests.waiting import LIMIT

LOGGER = "lightning.callbacks.image_logger.params"
IMAGES = f"{LOGGER}.disabled=false {LOGGER}.batch_frequency=1"


def test_a_disk_that_is_full_for_logs_and_images_does_not_end_a_run(train, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("csv.DictWriter.writerows", full)
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    assert train(f"--max_steps 4 {IMAGES}") == 0
    assert state(the_run(tmp_path / "logs") / "checkpoints" / "last.ckpt")["global_step"] == 4
    said = "".join(caplog.messages)
    for what in ("The log of CSVLogger", "The log of TensorBoardLogger", "Training images"):
        assert said.count(f"{what} cannot be written") == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["deleted", "replaced"])
def test_a_shard_that_fails_while_training_loses_nothing(train, tmp_path, monkeypatch, workers, fault):
    from ldm.callbacks.progress import ProgressBar

    shard = tmp_path / "shards" / "s-000001.tar"

    def damage(self, trainer, *_):
        if trainer.global_step == 3 and fault == "deleted":
            shard.unlink(missing_ok=True)
        elif trainer.global_step == 3:
            data = shard.read_bytes()
            shard.unlink()
            shard.write_bytes(data)

    monkeypatch.setattr(ProgressBar, "on_train_batch_end", damage)
    said = "^shards/s-000001.tar: " + ("was deleted or moved" if fault == "deleted" else "was replaced")
    with pytest.raises(UserError, match=said):
        train(f"--max_steps 40 data.params.num_workers={workers}")
    assert state(the_run(tmp_path / "logs") / "checkpoints" / "last.ckpt")["global_step"] >= 3


def test_a_second_start_in_a_run_is_refused(train, tmp_path):
    from ldm.locks import locked

    assert train("--max_steps 1") == 0
    run = the_run(tmp_path / "logs")
    with locked(run / ".lock", "it"), pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing it"):
        train(f"--resume {run} --max_steps 2")
    assert train(f"--resume {run} --max_steps 2") == 0


@pytest.mark.parametrize("limit", ["0", "0.000001"])
def test_event_files_at_their_limit_get_numbers_and_no_images(train, tmp_path, caplog, limit):
    assert train(f"--max_steps 4 {IMAGES} {LOGGER}.event_file_gb={limit}") == 0
    run = the_run(tmp_path / "logs")
    events = b"".join(path.read_bytes() for path in run.glob("tensorboard/events*"))
    assert events.count(b"train/loss_simple") == 4 and events.count(b"train/samples") == 0
    assert len({path.name.partition("_gs-")[2] for path in run.glob("images/train/samples_gs-*.png")}) == 4
    assert "".join(caplog.messages).count("have reached") == 1
    assert state(run / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_event_files_below_their_limit_get_images(train, tmp_path, caplog):
    caplog.set_level("INFO")
    assert train(f"--max_steps 1 {IMAGES}") == 0
    events = b"".join(path.read_bytes() for path in the_run(tmp_path / "logs").glob("tensorboard/events*"))
    assert b"train/samples" in events
    assert any("the newest 1000" in message and "up to 2 GB" in message for message in caplog.messages)


BROKEN = "lightning.logger.target=tests.broken_logger.BrokenLogger"


def test_a_logger_that_cannot_be_started_is_refused_in_one_line(train, tmp_path):
    said = (
        r"lightning.logger: tests.broken_logger.BrokenLogger cannot be started \(ConnectionError: api_key .* login\)$"
    )
    with pytest.raises(UserError, match=said):
        train(f"--max_steps 4 {BROKEN} lightning.logger.params.at_once=true")
    assert not (tmp_path / "logs").exists()


def test_a_logger_that_fails_at_every_call_ends_no_run(train, tmp_path, caplog):
    assert train(f"--max_steps 4 {IMAGES} {BROKEN}") == 0
    run = the_run(tmp_path / "logs")
    assert state(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    said = "The log of BrokenLogger cannot be written (the service is down); training continues without it"
    assert [message.strip() for message in caplog.messages].count(said) == 1
    assert "".join(caplog.messages).count("BrokenLogger") == 1
    assert len(logged(run, "train/loss")) == 4, "the CSV log is complete"


@pytest.mark.parametrize("redirected", ["> /dev/full 2>&1", "<&- >&- 2>&-"])
def test_messages_that_cannot_be_written_do_not_end_a_run(tmp_path, redirected):
    write_inputs(tmp_path)
    line = f"{sys.executable} {ROOT / 'main.py'} -b tiny.yaml -t --no-test --max_steps 4 {IMAGES} {redirected}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("LDM_RUN_FOLDER", None)
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, timeout=LIMIT).returncode == 0
    run = the_run(tmp_path / "logs")
    assert state(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert len(logged(run, "train/loss")) == 4 and len(list(run.glob("images/train/samples_gs-*.png"))) == 4
