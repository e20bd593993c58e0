"""Sums of losses by timestep, on the device of the losses, so that no step waits for them."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from ldm.shards.sample import IS_PRIOR


def training_samples(batch: Any) -> Tensor | None:
    """Return True for the samples of a training `batch` that are not of a prior, bool (B,), or None for all."""
    prior = batch.get(IS_PRIOR) if isinstance(batch, dict) else None
    return None if prior is None else ~prior


def add_losses(
    sums: Tensor | None, model: LightningModule, bins: int, counted: Tensor | None = None, *, finite: bool = False
) -> Tensor | None:
    """Add the losses of the model's last batch to `sums`, and return them; None as long as there are no losses.

    Args:
        sums: (2, bins): sum of the losses in each of `bins` bins of equal width, and number of samples; None at first.
        counted: (B,), the samples that count, by default all.
        finite: leave out losses that are not finite.
    """
    samples = getattr(model, "sample_losses", None)
    if samples is None:
        return sums
    timesteps, losses = samples  # (B,), (B,)
    losses = losses.float()
    number = losses.isfinite() if finite else torch.ones_like(losses, dtype=torch.bool)
    if counted is not None:
        number = number & counted.to(losses.device)
    sums = torch.zeros(2, bins, device=losses.device) if sums is None else sums.to(losses.device)
    place = (timesteps * bins).div(model.num_timesteps, rounding_mode="floor").long()
    return sums.index_add_(1, place, torch.stack([torch.where(number, losses, 0.0), number.float()]))
