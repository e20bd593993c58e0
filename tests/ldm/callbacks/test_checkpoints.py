"""Tests of the intervals of `last.ckpt`, and of a full disk."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks.checkpoints import LastCheckpoint
from ldm.callbacks.faults import NumericalFault
from ldm.callbacks.kept import KeptCheckpoints
from ldm.callbacks.saving import keep_numbered, try_save
from ldm.callbacks.signals import SignalRequests, TrainingStopped
from ldm.util import UserError
from tests.waiting import LIMIT


class Run:
    """Fake run of three epochs with ten seconds per step, which records the steps with a checkpoint."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saved: list[int] = []
        self.path = folder / "last.ckpt"
        self.seconds_to_write = 0.0
        self.full: set[int] = set()  # steps at which there is no room
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def __call__(self, steps_an_epoch: int = 4, max_steps: int = -1, max_epochs: int = -1, **params) -> list[int]:
        trainer = self.trainer = SimpleNamespace(
            max_steps=max_steps,
            max_epochs=max_epochs,
            world_size=1,
            is_global_zero=True,
            fast_dev_run=False,
            global_step=0,
            optimizers=[],
            fit_loop=SimpleNamespace(state_dict=dict, restarted_mid_epoch=False),
            save_checkpoint=self.save,
            strategy=SimpleNamespace(barrier=lambda name: None),
        )
        callback = self.callback = LastCheckpoint(self.path, SignalRequests(), **params)
        callback.on_train_start(trainer, None)
        for step in range(1, 3 * steps_an_epoch + 1):
            self.now += 10
            trainer.global_step, trainer.current_epoch = step, (step - 1) // steps_an_epoch
            trainer.is_last_batch = step % steps_an_epoch == 0
            callback.on_train_batch_end(trainer, None, None, None, 0)
        return self.saved

    def save(self, path: Path, storage_options: Callable[..., None]) -> None:
        self.now += self.seconds_to_write
        storage_options(
            SimpleNamespace(nbytes=8, tensors=[], write=functools.partial(self.write, self.trainer.global_step))
        )

    def write(self, step: int, path: Path) -> None:
        if step in self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.saved.append(step)
        path.unlink(missing_ok=True)  # a new file, as a renamed one is
        path.write_text(str(step))
        os.utime(path, (self.now, self.now))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    run = Run(tmp_path, monkeypatch)
    monkeypatch.setattr(SignalRequests, "install", lambda self: None)
    monkeypatch.setattr("ldm.callbacks.background_writer.available_memory", lambda: 0)  # so that training waits
    return run


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [4, 8, 12]),
        ({"every_n_train_steps": 5}, [5, 10]),
        ({"every_n_train_steps": 1000}, []),
        ({"every_n_train_steps": 1000, "max_epochs": 3}, [12]),
        ({"every_n_train_steps": 5, "max_steps": 7}, [5, 7, 10]),
        ({"train_time_interval": 0.5}, [3, 6, 9, 12]),
        ({"train_time_interval": 0.6}, [4, 8, 12]),
        ({"train_time_interval": 0.5, "every_n_train_steps": 4}, [3, 4, 7, 8, 11, 12]),
        ({"every_n_train_steps": 1, "periodic": False, "train_time_interval": 0.5, "max_epochs": 3}, []),
    ],
    ids=[
        "each epoch",
        "by steps alone",
        "short epochs write nothing",
        "the last epoch's end",
        "the last step",
        "by the clock alone",
        "at the first step after it is time",
        "by steps, and time since the last",
        "by signals alone",
    ],
)
def test_last_checkpoint_is_due(run: Run, params: dict, expected: list[int]) -> None:
    assert run(**params) == expected


def test_the_clock_starts_again_when_a_checkpoint_is_written(run: Run) -> None:
    run.seconds_to_write = 100
    assert run(train_time_interval=0.5) == [3, 6, 9, 12]


def test_the_newest_checkpoints_are_kept_by_number(run: Run) -> None:
    run(every_n_train_steps=3, save_last_k=2)
    kept = {path.name: path.read_text() for path in run.path.parent.iterdir()}
    assert kept == {"last.ckpt": "12", "step=000000009.ckpt": "9", "step=000000012.ckpt": "12"}


def test_the_newest_checkpoints_are_those_written_last(tmp_path: Path) -> None:
    """A run that was resumed from an earlier step leaves files with higher steps."""
    for age, step in enumerate((30, 40, 20)):
        (tmp_path / "last.ckpt").unlink(missing_ok=True)
        (tmp_path / "last.ckpt").write_text(str(step))
        os.utime(tmp_path / "last.ckpt", (age, age))
        keep_numbered(tmp_path / "last.ckpt", step, 2)
    assert sorted(path.name for path in tmp_path.glob("step*")) == ["step=000000020.ckpt", "step=000000040.ckpt"]


def test_a_numbered_checkpoint_is_a_hard_link_or_a_copy(tmp_path: Path, monkeypatch) -> None:
    last = tmp_path / "last.ckpt"
    last.write_text("7")
    keep_numbered(last, 7, 3)
    assert (tmp_path / "step=000000007.ckpt").samefile(last)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", refuse)
    keep_numbered(last, 8, 3)
    copy = tmp_path / "step=000000008.ckpt"
    assert copy.read_text() == "7" and not copy.samefile(last)


def test_training_continues_on_a_full_disk(run: Run, caplog) -> None:
    run.full = {2, 4}
    assert run(every_n_train_steps=2, max_steps=6) == [6, 8, 10, 12]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2 and "No checkpoint at step 2: " in said[0]
    assert f"{run.path}: No space left on device; training continues" in said[0]


@pytest.mark.parametrize("limits", [{"max_steps": 6}, {"max_epochs": 3}], ids=["steps", "epochs"])
def test_a_full_disk_at_the_end_is_an_error(run: Run, limits: dict) -> None:
    run.full = {6, 12}
    with pytest.raises(OSError, match="No space left on device"):
        run(every_n_train_steps=5, **limits)


def test_all_processes_know_that_one_could_not_write(caplog) -> None:
    decided = []
    strategy = SimpleNamespace(reduce_boolean_decision=lambda mine: decided.append(mine), barrier=lambda name: None)
    trainer = SimpleNamespace(world_size=2, strategy=strategy)  # `append` says None: another process failed
    assert not try_save(trainer, lambda: None) and decided == [True] and not caplog.records
    with pytest.raises(UserError, match="could not write the last checkpoint"):
        try_save(trainer, lambda: None, needed=True)


@pytest.fixture
def writer(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return a run that has memory for copies, and a fake copy."""
    monkeypatch.setattr("ldm.callbacks.background_writer.available_memory", lambda: 1 << 40)
    save = run.save

    def save_copied(path: Path, storage_options: Callable[..., None], **_: object) -> None:
        def give(checkpoint: SimpleNamespace) -> None:
            checkpoint.memory_for_copy, checkpoint.placed_in = object, lambda memory: checkpoint
            storage_options(checkpoint)

        save(path, storage_options=give)

    run.save = save_copied
    return run


def test_a_disk_that_is_full_in_the_background_is_told_later(writer: Run, caplog) -> None:
    writer.full = {2, 4, 8}
    assert writer(every_n_train_steps=2) == [6, 10, 12]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(": ")[0].split()[-1] for text in said] == ["2", "4", "8"]
    assert f"{writer.path}: No space left on device; training continues" in said[0]


def test_an_error_in_the_background_is_no_saved_checkpoint(writer: Run, caplog) -> None:
    caplog.set_level("INFO")
    writer(every_n_train_steps=2)

    def refuse(step: int, path: Path) -> None:
        raise UserError(f"{path}: a folder")

    writer.write = refuse
    writer.trainer.global_step, writer.trainer.sanity_checking = 13, False
    writer.callback._save(writer.trainer, announce=False)
    for _ in range(2):  # of the thread, and of writing again
        with pytest.raises(UserError, match="a folder"):
            writer.callback._save(writer.trainer, announce=True)
    assert "Saved step" not in caplog.text


def test_the_first_of_several_processes_writes_in_a_thread(writer: Run) -> None:
    threads, write = [], writer.write

    def note(step: int, path: Path) -> None:
        threads.append(threading.current_thread() is not threading.main_thread())
        write(step, path)

    writer.write = note
    writer(every_n_train_steps=1000)
    writer.trainer.world_size = 2
    writer.trainer.strategy.reduce_boolean_decision = lambda own, all=True: own
    writer.callback._save(writer.trainer, announce=False)
    writer.callback._finish_writing()
    writer.trainer.global_step += 1
    writer.callback._save(writer.trainer, announce=True)
    assert threads == [True, False]


def test_a_thread_that_failed_in_the_first_process_makes_all_write_again(writer: Run) -> None:
    """The others know nothing of it. Here they believe that the step is saved, whatever this process says."""
    heard: list[bool] = []

    def reduce(own: bool, all: bool = True) -> bool:
        heard.append(own)
        return own if all else False

    writer.full = {12}
    writer(every_n_train_steps=4)
    writer.callback._finish_writing()
    writer.full, writer.trainer.world_size = set(), 2
    writer.trainer.strategy.reduce_boolean_decision = reduce
    writer.callback._save(writer.trainer, announce=True)
    assert heard == [False, True] and writer.saved == [4, 8, 12]
    writer.callback._save(writer.trainer, announce=True)
    assert heard == [False, True, True] and writer.saved == [4, 8, 12]


def test_a_stop_at_a_step_that_is_being_written_waits_for_it(writer: Run) -> None:
    writer.full = {12}
    writer(every_n_train_steps=2)
    writer.full, writer.callback.requests.stop = set(), signal.SIGINT
    writer.trainer.sanity_checking = False
    with pytest.raises(TrainingStopped):  # the one of step 12 failed, so it is written again
        writer.callback.on_validation_batch_end(writer.trainer)
    assert writer.saved == [2, 4, 6, 8, 10, 12] and writer.path.read_text() == "12"


def test_an_error_of_training_waits_for_the_checkpoint(writer: Run) -> None:
    started, go_on, write = threading.Event(), threading.Event(), writer.write

    def write_slowly(step: int, path: Path) -> None:
        if step == 12:
            started.set()
            assert go_on.wait(LIMIT)
        write(step, path)

    writer.write = write_slowly
    writer(every_n_train_steps=2)
    assert started.wait(LIMIT) and writer.callback._background.is_busy and writer.path.read_text() == "10"
    writer.callback.on_exception(writer.trainer, None, SystemExit(130))  # a second signal: quits at once
    assert writer.callback._background.is_busy
    threading.Timer(0.01, go_on.set).start()
    writer.callback.on_exception(writer.trainer, None, NumericalFault("not finite"))
    assert not writer.callback._background.is_busy and writer.path.read_text() == "12"


def test_slow_writing_gives_one_warning(run: Run, caplog) -> None:
    run.seconds_to_write = 30
    run(every_n_train_steps=2)
    (said,) = caplog.messages
    assert "Writing checkpoints has taken 60 % of the training time" in said  # 60 of 100 seconds
    caplog.clear()
    run.seconds_to_write = 1
    run(every_n_train_steps=2)
    assert not caplog.records


def test_slow_writing_includes_the_best_checkpoints(run: Run, tmp_path: Path, monkeypatch, caplog) -> None:
    def write(self: KeptCheckpoints, trainer: SimpleNamespace, candidates: dict) -> None:
        run.now += 30

    monkeypatch.setattr("pytorch_lightning.callbacks.ModelCheckpoint._save_topk_checkpoint", write)
    run(every_n_train_steps=1000)
    kept = KeptCheckpoints(dirpath=str(tmp_path), monitor="val/loss")
    kept.writing = run.callback.writing
    for _ in range(3):
        kept._save_topk_checkpoint(run.trainer, {})
    (said,) = caplog.messages
    assert "Writing checkpoints has taken 33 % of the training time" in said  # 60 of 180 seconds


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps 0: give a whole number of at least 1"),
        ({"every_n_train_steps": 2.5}, "every_n_train_steps 2.5: give a whole number"),
        ({"train_time_interval": "00:30"}, "train_time_interval '00:30': give a number of minutes"),
        ({"train_time_interval": -1}, "train_time_interval -1: give a number of minutes from 0 to 10000000"),
        ({"save_last_k": True}, "save_last_k True: give a whole number of at least 0"),
        ({"in_background": "no"}, "in_background 'no' is unknown"),
    ],
)
def test_invalid_numbers_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"lightning.modelcheckpoint.params.{message}"):
        LastCheckpoint(Path("last.ckpt"), SignalRequests(), **params)


@pytest.mark.parametrize("key", ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"])
def test_a_checkpoint_cannot_make_a_run_delete_other_files(tmp_path: Path, key: str) -> None:
    """A run removes only checkpoints in its own folder, also if its state names other files."""
    state = {"dirpath": str(tmp_path), "best_model_score": None, "best_model_path": "", "best_k_models": {}}
    not_its_own = ((str(tmp_path / name), False) for name in ("last.ckpt", "step=000000003.ckpt"))  # LastCheckpoint's
    own, other = str(tmp_path / "a.ckpt"), str(tmp_path.parent / "a.ckpt")
    for path, taken in ((own, True), (other, False), (str(tmp_path / "x.py"), False), *not_its_own):
        kept = KeptCheckpoints(dirpath=str(tmp_path), monitor="val/loss", save_top_k=2)
        kept.load_state_dict(state | {key: {path: torch.tensor(1.0)} if key == "best_k_models" else path})
        assert (getattr(kept, key) in (path, {path: torch.tensor(1.0)})) == taken


@pytest.mark.parametrize("monitor", [3, {"a": 1}, ["train/loss"]])
def test_kept_checkpoints_refuse_a_monitor_that_is_no_name(monitor):
    with pytest.raises(UserError, match=r"^monitor .*: give the name of a metric, or null"):
        KeptCheckpoints(dirpath="checkpoints", monitor=monitor)


@pytest.mark.parametrize("interval", [1, 1.0, 5])
@pytest.mark.parametrize("asked", [True, False, None])
def test_a_validated_step_is_ranked_right_after_its_validation(tmp_path: Path, monkeypatch, interval, asked) -> None:
    """Lightning takes an interval of one batch for one of a whole epoch, at whose end the weights are others."""
    ranked = []
    monkeypatch.setattr(KeptCheckpoints, "_save_topk_checkpoint", lambda kept, trainer, _: ranked.append(trainer))
    kept = KeptCheckpoints(dirpath=str(tmp_path), monitor="val/loss", save_on_train_epoch_end=asked)
    trainer = SimpleNamespace(
        callback_metrics={}, sanity_checking=False, global_step=1, current_epoch=0, val_check_interval=interval,
        check_val_every_n_epoch=1, num_val_batches=[1], fast_dev_run=False, state=SimpleNamespace(fn="fit"),
        is_global_zero=True,
    )  # fmt: skip
    kept.on_validation_start(trainer, None)
    trainer.callback_metrics["val/loss"] = torch.tensor(0.5)
    kept._monitor_candidates = lambda _: {}
    kept.on_validation_end(trainer, None)
    assert ranked == [trainer]
