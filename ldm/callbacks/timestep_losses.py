"""Callback that logs the losses of training and of held-out images by band of timesteps."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ldm.callbacks.timestep_sums import add_losses, training_samples
from ldm.distributed.collectives import mean_over_processes
from ldm.util import check_number


class TimestepLosses(Callback):
    """Callback that logs `train/loss_t<first>_<last>` and `val/loss_t<first>_<last>`, mean losses by band of timesteps.

    The loss depends much more on the timestep than on the model, so a band shows progress that the whole loss hides.
    The mean of training is over the samples of the first process since the previous log, every `log_every_n_steps`,
    without those of a prior. That of validation is over all held-out samples, with the weights and not their average;
    it needs no further pass through the model. A band without samples is left out. Losses are summed on the device, so
    that no other step waits for them.

    Args:
        bands: number of bands of equal width.

    Raises:
        UserError: `bands` is below 1.
    """

    def __init__(self, bands: int = 4) -> None:
        check_number("bands", bands, least=1)
        self.bands = bands
        self._training: Tensor | None = None  # (2, bands): sum of the losses, and number of samples
        self._held_out: Tensor | None = None
        self._logged = 0  # step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or not trainer.loggers:
            return
        self._training = add_losses(self._training, pl_module, self.bands, training_samples(batch))
        every, step = trainer.log_every_n_steps, trainer.global_step
        if self._training is not None and every and step % every == 0 and step != self._logged:
            self._logged = step
            values = self._means(self._training, pl_module, "train")
            self._training.zero_()
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step - 1)  # Lightning's step of this batch

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._held_out = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not trainer.sanity_checking:
            self._held_out = add_losses(self._held_out, pl_module, self.bands)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self._held_out is not None:
            sums = mean_over_processes(self._held_out)
            pl_module.log_dict(self._means(sums, pl_module, "val"), batch_size=1)

    def _means(self, sums: Tensor, model: LightningModule, split: str) -> dict[str, float]:
        """Return the mean loss of each band that has samples, by the name of its metric."""
        count = model.num_timesteps
        edges = [-(-band * count // self.bands) for band in range(self.bands + 1)]  # the first timestep of each band
        return {
            f"{split}/loss_t{edges[band]}_{edges[band + 1] - 1}": total / number
            for band, (total, number) in enumerate(zip(*sums.tolist(), strict=True))
            if number
        }
