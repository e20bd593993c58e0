"""Frequency of validation when an epoch is short."""

from __future__ import annotations

import logging

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping

log = logging.getLogger(__name__)


class SparseValidation(Callback):
    """Callback that validates after the whole number of epochs that covers `every_n_train_steps`, and before the last
    step.

    An epoch of a few images takes seconds. Each validation that finds a better model writes a checkpoint, which takes
    longer for a large one. If an epoch has at least that many steps, each epoch is validated.
    """

    def __init__(self, every_n_train_steps: int) -> None:
        self.every_n_train_steps = every_n_train_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation or trainer.num_training_batches in (0, float("inf")):
            return
        steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)  # of an epoch
        limits = [-(-self.every_n_train_steps // steps), trainer.max_steps // steps, trainer.max_epochs or -1]
        epochs = max(1, min(limit for limit in limits if limit >= 0))
        if epochs > 1:
            trainer.check_val_every_n_epoch = epochs
            for callback in trainer.callbacks:
                if isinstance(callback, EarlyStopping):  # which took it for 1 when it was set up
                    callback._check_on_train_epoch_end = False
            log.info("Validation after every %d epochs, %d steps; --check_val_every_n_epoch or --val_check_interval "
                     "sets it", epochs, epochs * steps)  # fmt: skip


class ValidationAcrossEpochs(Callback):
    """Callback for a `val_check_interval` in batches: it counts them within each epoch, or across short epochs.

    The Trainer must be made with `check_val_every_n_epoch=None`. Otherwise it refuses an interval beyond an epoch
    before a callback can know the length of an epoch.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interval, batches = trainer.val_check_interval, trainer.num_training_batches
        if interval <= batches:
            trainer.check_val_every_n_epoch = 1
        elif trainer.enable_validation and trainer.is_global_zero:
            log.info("Validation after every %d batches, across epochs, which have %d batches", interval, batches)
