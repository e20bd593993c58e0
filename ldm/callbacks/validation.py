"""Callback that validates less often if epochs are short."""

from __future__ import annotations

import logging

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping

log = logging.getLogger(__name__)


class SparseValidation(Callback):
    """Callback that validates after as many epochs as cover `every_n_train_steps`, and at the latest at the last step.

    An epoch of a few images takes seconds, but each validation that finds a better model writes a checkpoint, which
    takes longer for a large model. If an epoch has at least `every_n_train_steps` steps, each epoch is validated.
    """

    def __init__(self, every_n_train_steps: int) -> None:
        self.every_n_train_steps = every_n_train_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation or trainer.num_training_batches in (0, float("inf")):
            return
        steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)  # per epoch
        limits = [-(-self.every_n_train_steps // steps), trainer.max_steps // steps, trainer.max_epochs or -1]
        epochs = max(1, min(limit for limit in limits if limit >= 0))
        if epochs > 1:
            trainer.check_val_every_n_epoch = epochs
            for callback in trainer.callbacks:
                if isinstance(callback, EarlyStopping):  # its set-up assumed a value of 1
                    callback._check_on_train_epoch_end = False
            log.info("Validation every %d epochs (%d steps); set --check_val_every_n_epoch or --val_check_interval "
                     "to change it", epochs, epochs * steps)  # fmt: skip


class ValidationAcrossEpochs(Callback):
    """Callback for a `val_check_interval` in batches. Batches are counted per epoch, or across epochs shorter than it.

    Create the Trainer with `check_val_every_n_epoch=None`. Otherwise it refuses an interval longer than an epoch
    before any callback knows the length of an epoch.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        interval, batches = trainer.val_check_interval, trainer.num_training_batches
        if interval <= batches:
            trainer.check_val_every_n_epoch = 1
        elif trainer.enable_validation and trainer.is_global_zero:
            log.info("Validation every %d batches, counted across epochs of %d batches", interval, batches)
