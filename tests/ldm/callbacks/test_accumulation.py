"""Gradient accumulation at the end of an epoch, and clipping of fused optimizers."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ldm.callbacks.accumulation import ClippedBeforeFused, MeanOfAccumulated
from ldm.optim import InBackward

DATA = torch.arange(10, dtype=torch.float32).reshape(10, 1) / 10


class Slope(pl.LightningModule):
    """One weight w with loss w · x, whose gradient is the mean of x; notes the change of each step."""

    def __init__(self, in_backward: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.in_backward = in_backward
        self.gradients: list[float] = []

    def training_step(self, batch, batch_idx):
        return (self.weight * batch[0]).mean()

    def optimizer_step(self, epoch, batch_idx, optimizer, closure=None):
        before = self.weight.item()
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.gradients.append(before - self.weight.item())

    def configure_optimizers(self):
        if self.in_backward:
            return InBackward(self.parameters(), 1.0, optimizer={"target": "torch.optim.SGD", "params": {}})
        return torch.optim.SGD(self.parameters(), 1.0)


def fit(model: pl.LightningModule, accumulate: int, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[MeanOfAccumulated(), ClippedBeforeFused()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, DataLoader(TensorDataset(DATA), 2))
    return trainer


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 5, 8])
def test_mean_of_accumulated_is_the_mean_of_the_batches_that_there_are(accumulate, in_backward):
    model = Slope(in_backward)
    fit(model, accumulate)
    means = [batch.mean().item() for batch in DATA.split(2)]
    windows = [means[start : start + accumulate] for start in range(0, 5, accumulate)]
    assert model.gradients == pytest.approx([sum(window) / len(window) for window in windows], abs=1e-6)


@pytest.mark.parametrize(("accumulate", "warned"), [(5, False), (8, True)])
def test_mean_of_accumulated_warns_of_a_learning_rate_scaled_for_more(accumulate, warned, caplog):
    fit(Slope(), accumulate)
    said = "An epoch has 5 of the 8 batches that accumulate_grad_batches asks for: each step is the mean of 5"
    assert (said in caplog.text) is warned


class FusedSlope(Slope):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, fused=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipped_before_fused_lets_lightning_clip(precision):
    fit(FusedSlope(), 1, precision=precision, gradient_clip_val=0.1)


def test_clipped_before_fused_has_a_gradient_scaler_unscale_first():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], 1e-2, fused=True)
    assert optimizer._step_supports_amp_scaling
    model = FusedSlope()
    trainer = fit(model, 1, gradient_clip_val=0.1)
    assert not trainer.optimizers[0]._step_supports_amp_scaling
    assert fit(FusedSlope(), 1).optimizers[0]._step_supports_amp_scaling, (
        "without clipping it stays fused with the scaler"
    )
