"""Callback that logs the loss of training by band of timesteps."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ldm.util import check_number


class TimestepLosses(Callback):
    """Callback that logs `train/loss_t<first>_<last>`, the mean loss of the samples in each band of timesteps.

    The loss depends much more on the timestep than on the model, so a band shows progress that the whole loss hides.
    The mean is over the samples of the first process since the previous log, every `log_every_n_steps`. A band without
    samples is left out. Losses are summed on the device, so that no other step waits for them.

    Args:
        bands: number of bands of equal width.

    Raises:
        UserError: `bands` is below 1.
    """

    def __init__(self, bands: int = 4) -> None:
        check_number("bands", bands, least=1)
        self.bands = bands
        self._sums: Tensor | None = None  # (2, bands): sum of the losses, and number of samples
        self._logged = 0  # step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        samples = getattr(pl_module, "sample_losses", None)
        if samples is None or not trainer.is_global_zero or not trainer.loggers:
            return
        count = pl_module.num_timesteps
        timesteps, losses = samples  # (B,), (B,)
        if self._sums is None:
            self._sums = torch.zeros(2, self.bands, device=losses.device)
        place = (timesteps * self.bands).div(count, rounding_mode="floor").long()
        self._sums.index_add_(1, place, torch.stack([losses.float(), torch.ones_like(losses, dtype=torch.float32)]))
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every and step % every == 0 and step != self._logged:
            self._logged = step
            self._log(trainer, count)

    def _log(self, trainer: Trainer, count: int) -> None:
        sums, numbers = self._sums.tolist()
        self._sums.zero_()
        edges = [-(-band * count // self.bands) for band in range(self.bands + 1)]  # the first timestep of each band
        values = {
            f"train/loss_t{edges[band]}_{edges[band + 1] - 1}": sums[band] / number
            for band, number in enumerate(numbers)
            if number
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # Lightning's step of this batch
