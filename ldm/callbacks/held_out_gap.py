"""Callback that logs the gap between the losses of training and of held-out images."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ldm.callbacks.timestep_sums import add_losses, training_samples
from ldm.distributed.collectives import mean_over_processes
from ldm.util import check_number


class HeldOutGap(Callback):
    """Callback that logs `val/gap`, the loss of held-out images minus that of training, at equal timesteps.

    The loss depends much more on the timestep than on the image, so each held-out loss is compared with the mean of the
    training losses in the same bin of timesteps, without samples of a prior. A bin without training losses is left out.
    A gap that grows while the training loss falls is overfitting. Both losses are of the weights, not of their average,
    and need no further passes through the model.

    Args:
        bins: number of bins of equal width.
        batches: number of batches over which the mean of the training losses reaches back. The weight of a batch falls
            by 1 / e over as many later ones.

    Raises:
        UserError: a number is below 1.
    """

    def __init__(self, bins: int = 50, batches: int = 1000) -> None:
        check_number("bins", bins, least=1)
        check_number("batches", batches, least=1)
        self.bins = bins
        self.kept = math.exp(-1 / batches)
        self._training: Tensor | None = None  # (2, bins): weighted sum of the losses, and of the samples
        self._held_out: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._training is None else {"training": self._training.cpu().clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sums = state_dict.get("training")
        if isinstance(sums, Tensor) and sums.shape == (2, self.bins):
            self._training = sums.clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.enable_validation:
            if self._training is not None:
                self._training *= self.kept
            counted = training_samples(batch)
            self._training = add_losses(self._training, pl_module, self.bins, counted, finite=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held_out = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._held_out = add_losses(self._held_out, pl_module, self.bins, finite=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self._held_out is None or self._training is None:
            return
        sums = torch.stack([self._training.to(self._held_out.device), self._held_out])
        training, held_out = mean_over_processes(sums)
        known = (training[1] > 0) & (held_out[1] > 0)
        if known.any():
            means = (training[0] / training[1])[known]
            gap = (held_out[0][known] - held_out[1][known] * means).sum() / held_out[1][known].sum()
            pl_module.log("val/gap", gap, batch_size=1)
