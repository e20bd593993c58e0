"""Tests of the number of epochs between validations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ldm.callbacks.validation import SparseValidation
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    the_run,
)

KEPT = "lightning.modelcheckpoint.params"


@pytest.mark.parametrize(
    ("batches", "given", "epochs"),
    [
        (5, {}, 200),
        (7, {}, 143),  # 1001 steps
        (1000, {}, 1),
        (5000, {}, 1),
        (5, {"accumulate_grad_batches": 2}, 334),  # 3 steps an epoch, the last of one batch
        (5, {"max_steps": 804}, 160),
        (5, {"max_steps": 4}, 1),  # none comes before the end
        (5, {"max_epochs": 30, "max_steps": -1}, 30),
        (float("inf"), {}, 1),
        (5, {"enable_validation": False}, 1),
    ],
)
def test_epochs_between_validations(batches: float, given: dict, epochs: int) -> None:
    limits = {"max_steps": 10000, "max_epochs": -1, "accumulate_grad_batches": 1, "enable_validation": True} | given
    trainer = SimpleNamespace(num_training_batches=batches, check_val_every_n_epoch=1, callbacks=[], **limits)
    SparseValidation(1000).on_train_start(trainer, None)
    assert trainer.check_val_every_n_epoch == epochs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("lightning.modelcheckpoint.params.every_n_train_steps=12", {12, 24}),
        ("lightning.modelcheckpoint.params.every_n_train_steps=5", {6, 12, 18, 24}),
        ("lightning.modelcheckpoint.params.every_n_train_steps=1000", {24}),
        ("lightning.modelcheckpoint.params.every_n_train_steps=12 --check_val_every_n_epoch 3", {18}),
        (f"{KEPT}.every_n_train_steps=12 {KEPT}.every_n_epochs=3", {6, 12, 18, 24}),
        ("", {6, 12, 18, 24}),  # as last.ckpt
    ],
)
def test_short_epochs_are_validated_as_often_as_they_are_saved(train, tmp_path, caplog, options, steps) -> None:
    """An epoch has six steps."""
    assert train(f"--max_steps 24 data.params.val_urls=shards/s-000000.tar {options}") == 0
    run = the_run(tmp_path / "logs")
    assert {step + 1 for step in logged(run, "val/loss_simple_ema")} == steps
    kept = {int(path.stem.rpartition("=")[2]) for path in (run / "checkpoints").glob("epoch*.ckpt")}
    assert kept and kept <= steps
    assert "No best checkpoints are kept" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interval", "steps", "said"),
    [(4, {4, 10, 16}, ""), (8, {8, 16}, "every 8 batches, counted across epochs of 6 batches"), (5_000_000, set(), "")],
)
def test_an_interval_beyond_an_epoch_is_counted_across_epochs(train, tmp_path, caplog, interval, steps, said) -> None:
    """Public configs validate every five million batches, which is never."""
    caplog.set_level("INFO")
    options = f"--val_check_interval {interval} --num_sanity_val_steps 0 data.params.val_urls=shards/s-000000.tar"
    assert train(f"--max_steps 18 {options}") == 0
    assert {step + 1 for step in logged(the_run(tmp_path / "logs"), "val/loss_simple_ema")} == steps
    assert said in caplog.text and ("across epochs" in caplog.text) == (interval > 6)


@pytest.mark.slow
def test_early_stopping_waits_for_a_validation(train, tmp_path) -> None:
    stopping = "lightning.callbacks.stopping"
    options = f"{stopping}.target=pytorch_lightning.callbacks.EarlyStopping {KEPT}.every_n_train_steps=12"
    options += f" {stopping}.params.monitor=val/loss_simple_ema data.params.val_urls=shards/s-000000.tar"
    assert train(f"--max_steps 24 {options}") == 0
    assert {step + 1 for step in logged(the_run(tmp_path / "logs"), "val/loss_simple_ema")} == {12, 24}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [12, 14])
def test_a_resumed_run_validates_as_an_uninterrupted_one(train, tmp_path, stop) -> None:
    options = "data.params.val_urls=shards/s-000000.tar lightning.modelcheckpoint.params.every_n_train_steps=12"
    train(f"-l straight --max_steps 25 {options}")
    train(f"-l resumed --max_steps {stop} {options}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 25")
    straight = the_run(tmp_path / "straight")
    assert_same_training(straight, resumed)
    for metric in ("val/loss_simple_ema", "val/gap"):
        assert logged(straight, metric) == logged(resumed, metric) != {}
