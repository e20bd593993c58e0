"""Tests of accumulation if an epoch ends before all batches of a step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from ldm.callbacks.accumulation import MeanOfBatches, accumulation_at_start
from ldm.data.batch_sampler import EpochBatchSampler
from ldm.optim import InBackward

BATCHES = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])


class Linear(LightningModule):
    """Module with the loss w * x, so that the gradient of a step is the mean of its batches."""

    def __init__(self, in_backward: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.in_backward = in_backward

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).mean()

    def configure_optimizers(self):
        if self.in_backward:
            return InBackward([self.weight], lr=1.0, optimizer={"target": "torch.optim.SGD"})
        return torch.optim.SGD([self.weight], lr=1.0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(BATCHES)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("data", [BATCHES, Stream()], ids=["listed", "streamed"])
@pytest.mark.parametrize(
    ("accumulate", "means"),
    [(1, [1, 2, 4, 8, 16]), (2, [1.5, 6, 16]), (3, [7 / 3, 12]), (16, [6.2])],
)
def test_mean_of_batches_averages_the_existing_batches(tmp_path, in_backward, data, accumulate, means) -> None:
    model = Linear(in_backward)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[MeanOfBatches()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=None))
    assert model.weight.item() == pytest.approx(-sum(means), rel=1e-6)
    assert trainer.global_step == len(means)


def fit_start(accumulate: int, batches: int = 5, loader: object = None, epochs: dict[int, int] | None = None) -> object:
    """Return a trainer at the start of its first epoch, and with a schedule of accumulation if `epochs` are given."""
    schedules = [GradientAccumulationScheduler(epochs)] if epochs else []
    return SimpleNamespace(
        is_global_zero=True, num_training_batches=batches, accumulate_grad_batches=accumulate, world_size=2,
        train_dataloader=loader, callbacks=schedules, current_epoch=0,
    )  # fmt: skip


@pytest.mark.parametrize(("accumulate", "warns"), [(4, False), (8, True)])
def test_a_step_that_is_smaller_than_the_learning_rate_was_scaled_for_is_told_of(caplog, accumulate, warns) -> None:
    trainer = fit_start(accumulate)
    MeanOfBatches(scaled_batch=3).on_train_epoch_start(trainer, SimpleNamespace(learning_rate=4.8e-5))
    said = [record.getMessage() for record in caplog.records]
    assert said == warns * [
        "A step has at most 30 images, those of a whole epoch, but the learning rate 4.800e-05 is scaled for 48 "
        "(accumulate_grad_batches 8 * devices 2 * batch_size 3); lower accumulate_grad_batches or batch_size, or give "
        "--scale_lr False"
    ]
    MeanOfBatches(None).on_train_epoch_start(trainer, SimpleNamespace(learning_rate=4.8e-5))  # not scaled
    assert len(caplog.records) == warns


@pytest.mark.parametrize(("drop_last", "batches", "images"), [(False, 3, 5), (True, 1, 0)])
def test_buckets_that_fill_no_batch_are_told_of(caplog, drop_last, batches, images) -> None:
    """Batches are of one bucket each, so that the whole set is larger than any step."""
    groups = [np.arange(5), np.arange(5, 8), np.arange(8, 12)]
    sampler = EpochBatchSampler(groups, 4, world=2, drop_last=drop_last)
    trainer = fit_start(1, batches, SimpleNamespace(batch_sampler=sampler))
    MeanOfBatches(scaled_batch=4).on_train_epoch_start(trainer, SimpleNamespace(learning_rate=1.0))
    assert f"A step has at most {images} images" in caplog.text and "scaled for 8" in caplog.text


def test_scheduled_accumulation_scales_the_rate_by_its_first_value_and_tells_of_the_others(caplog) -> None:
    trainer = fit_start(1, epochs={0: 2, 4: 5})
    assert accumulation_at_start(trainer) == 2
    callback, model = MeanOfBatches(scaled_batch=3), SimpleNamespace(learning_rate=1.2e-5)
    for trainer.current_epoch, trainer.accumulate_grad_batches in enumerate((2, 2, 2, 2, 5, 5)):
        callback.on_train_epoch_start(trainer, model)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("A step has 30 images from epoch 4 on, which accumulates 5 batches, but the learning rate")
    assert "stays scaled for 12 (accumulate_grad_batches 2 * devices 2 * batch_size 3)" in said
