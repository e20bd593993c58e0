"""Tests of accumulation if an epoch ends before all batches of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from ldm.callbacks.accumulation import MeanOfBatches
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


@pytest.mark.parametrize(("accumulate", "warns"), [(4, False), (8, True)])
def test_a_step_that_is_smaller_than_the_learning_rate_was_scaled_for_is_told_of(caplog, accumulate, warns) -> None:
    trainer = SimpleNamespace(
        is_global_zero=True, num_training_batches=5, accumulate_grad_batches=accumulate, world_size=2,
        train_dataloader=None,
    )  # fmt: skip
    MeanOfBatches(scaled_batch=3).on_train_start(trainer, SimpleNamespace(learning_rate=4.8e-5))
    said = [record.getMessage() for record in caplog.records]
    assert said == warns * [
        "A step has at most 30 images, those of a whole epoch, but the learning rate 4.800e-05 is scaled for 48 "
        "(accumulate_grad_batches 8 * devices 2 * batch_size 3); lower accumulate_grad_batches or batch_size, or give "
        "--scale_lr False"
    ]
    MeanOfBatches(None).on_train_start(trainer, SimpleNamespace(learning_rate=4.8e-5))  # a rate that is not scaled
    assert len(caplog.records) == warns
