"""Progress of training: loss, images per second and peak memory, as a bar on a terminal, otherwise as log lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import Tensor

from ldm.callbacks.device import peak_memory
from ldm.host_copy import HostCopy

log = logging.getLogger(__name__)


class LatestNumber:
    """Number copied from the device without waiting: a read returns the last one that has arrived."""

    def __init__(self) -> None:
        self._arrived: float | None = None
        self._copy: HostCopy | None = None

    def fetch(self, number: Tensor) -> None:
        """Send `number`, a tensor with one element, to the host."""
        self.read()
        self._copy = HostCopy(number)

    def read(self, wait: bool = False) -> float | None:
        """Return the last number that has arrived, or None; with `wait`, wait for the last one that was sent."""
        if self._copy is not None and (wait or self._copy.has_arrived):
            self._arrived, self._copy = self._copy.get().item(), None
        return self._arrived


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with images per second and peak memory, redrawn at intervals of time.

    Training does not wait for the bar. On CUDA, the bar shows the loss of its previous redraw.

    Args:
        refresh_rate: minimum number of batches between redraws; 0 for no bar.
        seconds: minimum number of seconds between redraws. The default is 0.5, or 10 if the output is not a terminal.
            In that case, each redraw logs a line instead.
    """

    def __init__(self, refresh_rate: int = 1, seconds: float | None = None) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._is_bar = sys.stdout.isatty()
        if not self._is_bar:
            self.disable()
        self._seconds = seconds if seconds is not None else (0.5 if self._is_bar else 10.0)
        self._first_batch = 0
        self._drawn = 0.0
        self._images = 0
        self._speed = 0.0
        self._loss = LatestNumber()

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches of this epoch, up to `max_steps`."""
        batches = self.trainer.num_training_batches
        if self.trainer.max_steps < 0:
            return batches
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        return min(batches, self._first_batch + left)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._drawn = time.perf_counter()
        # Lightning does not call on_train_epoch_start if a run resumes within an epoch.
        self._first_batch = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        self.on_train_epoch_start(trainer, pl_module)
        self._first_batch = 0

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        if self._is_bar:  # log lines follow the clock alone
            self._drawn, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += batch_size(batch) * trainer.world_size
        elapsed = time.perf_counter() - self._drawn
        is_last = trainer.global_step == trainer.max_steps or (self._is_bar and trainer.is_last_batch)
        if elapsed >= self._seconds or is_last:
            self._speed = self._images / elapsed
            if outputs:
                self._loss.fetch(outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning divided it
            if self._is_bar:
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            elif trainer.is_global_zero:
                self._log_line(trainer, pl_module)
            self._drawn, self._images = time.perf_counter(), 0

    def _log_line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = self.get_metrics(trainer, pl_module)
        values = (
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in metrics.items()
        )
        log.info("Epoch %d, step %d: %s", trainer.current_epoch, trainer.global_step, ", ".join(values))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        loss = self._loss.read(wait=trainer.global_step == trainer.max_steps)
        if loss is not None:
            metrics["loss"] = loss
        metrics["img/s"] = f"{self._speed:.1f}"
        metrics["mem"] = f"{peak_memory(trainer.strategy.root_device) / 2**30:.2f}GiB"
        return metrics


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch, read from a mapping's first value or a sequence's first entry."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()))
    elif isinstance(batch, (list, tuple)) and hasattr(batch[0], "__len__"):
        batch = batch[0]
    return len(batch)
