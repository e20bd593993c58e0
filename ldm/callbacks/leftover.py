"""What is left to do of a resumed run."""

from __future__ import annotations

import logging

from pytorch_lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


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
