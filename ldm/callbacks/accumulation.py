"""Correct scale of optimizer steps with fewer batches than `accumulate_grad_batches`."""

from __future__ import annotations

import logging
import math
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

log = logging.getLogger(__name__)


class MeanOfBatches(Callback):
    """Callback that makes each optimizer step the mean over its batches, also when an epoch ends early.

    Lightning divides each batch's loss by `accumulate_grad_batches`, and always steps at the last batch of an epoch. If
    such a step has fewer batches, this callback scales its last loss and the gradients accumulated before by
    `accumulate_grad_batches` / batches. It does so before the last backward pass, so that DistributedDataParallel and
    optimizers that step inside backward see scaled gradients. It must be the last callback: those before it expect the
    loss as Lightning divided it.

    Args:
        scaled_batch: batch size that the learning rate was multiplied by; None if it was not scaled. The callback warns
            if no step can have as many images as the learning rate was scaled for.
    """

    def __init__(self, scaled_batch: int | None = None) -> None:
        self.scaled_batch = scaled_batch
        self._batches = 0  # number of batches whose gradients are accumulated
        self._batch_idx = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = 0
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        if self.scaled_batch is None or not trainer.is_global_zero or not 0 < batches < math.inf:
            return
        scaled_for = accumulate * trainer.world_size * self.scaled_batch
        images = min(accumulate, batches) * trainer.world_size * self.scaled_batch
        groups = getattr(getattr(trainer.train_dataloader, "batch_sampler", None), "groups", None)
        if groups is not None:
            images = min(images, sum(map(len, groups)))
        if images < scaled_for:
            log.warning(
                "A step has at most %d images, those of a whole epoch, but the learning rate %.3e is scaled for %d "
                "(accumulate_grad_batches %d * devices %d * batch_size %d); lower accumulate_grad_batches or "
                "batch_size, or give --scale_lr False",
                images, pl_module.learning_rate, scaled_for, accumulate, trainer.world_size, self.scaled_batch,
            )  # fmt: skip

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        accumulate = trainer.accumulate_grad_batches
        if accumulate == 1:
            return
        self._batches += 1
        number = self._batch_idx + 1
        if number % accumulate and not trainer.is_last_batch and number != trainer.num_training_batches:
            return
        if self._batches < accumulate:
            factor = accumulate / self._batches
            loss.mul_(factor)
            if self._batches > 1:
                for parameter in pl_module.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
        self._batches = 0
