"""The learning rate of a resumed run."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

log = logging.getLogger(__name__)


class LearningRateOnResume(Callback):
    """Gives a resumed run the learning rate that its config says now.

    Left alone, the optimizer would silently go on with the saved one. Schedules and ratios between parameter groups
    stay as they are; nothing is touched while the rate is the same.
    """

    def __init__(self) -> None:
        self._saved: float | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["learning_rate"] = pl_module.learning_rate

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("learning_rate")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved, now = self._saved, pl_module.learning_rate
        if not saved or saved == now:
            return
        log.info("The learning rate was %.3e in the checkpoint, and is %.3e from here on", saved, now)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr"):
                    if isinstance(group.get(key), Tensor):  # some optimizers read it on the device
                        group[key].mul_(now / saved)
                    elif key in group:
                        group[key] *= now / saved
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [rate * now / saved for rate in config.scheduler.base_lrs]


class NothingLeft(Callback):
    """Says that a resumed run had all its steps already, which Lightning skips without a word."""

    def __init__(self) -> None:
        self._started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._started:
            limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
            given = ", ".join(f"{name}={limit}" for name, limit in limits.items() if limit not in (None, -1))
            log.warning("Nothing was trained: already at step %d (%s)", trainer.global_step, given)
