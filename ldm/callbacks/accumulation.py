"""Correct scale of optimizer steps with fewer batches than `accumulate_grad_batches`."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import Tensor

log = logging.getLogger(__name__)


def accumulation_at_start(trainer: Trainer) -> int:
    """Return the number of accumulated batches in the first epoch, also if a callback schedules them."""
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(0)
    return trainer.accumulate_grad_batches


class MeanOfBatches(Callback):
    """Callback that makes each optimizer step the mean over its batches, also when an epoch ends early.

    Lightning divides each batch's loss by `accumulate_grad_batches`, and always steps at the last batch of an epoch. If
    such a step has fewer batches, this callback scales its last loss and the gradients accumulated before by
    `accumulate_grad_batches` / batches. It does so before the last backward pass, so that DistributedDataParallel and
    optimizers that step inside backward see scaled gradients. It must be the last callback: those before it expect the
    loss as Lightning divided it.

    Args:
        scaled_batch: batch size that the learning rate was multiplied by; None if it was not scaled. The callback warns
            if no step can have as many images as the learning rate was scaled for, or if a schedule of accumulation
            changes their number.
    """

    def __init__(self, scaled_batch: int | None = None) -> None:
        self.scaled_batch = scaled_batch
        self._batches = 0  # number of batches whose gradients are accumulated
        self._batch_idx = 0
        self._compared: set[int] = set()  # values of accumulate_grad_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = 0
        self._compared = set()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        if self.scaled_batch is None or not trainer.is_global_zero or accumulate in self._compared or not batches:
            return
        self._compared.add(accumulate)
        first = accumulation_at_start(trainer)
        scaled_for = first * trainer.world_size * self.scaled_batch
        images = self._largest_step(trainer, min(accumulate, batches))
        factors = f"accumulate_grad_batches {first} * devices {trainer.world_size} * batch_size {self.scaled_batch}"
        if images < scaled_for and accumulate <= first:
            log.warning(
                "A step has at most %d images, those of %s, but the learning rate %.3e is scaled for %d (%s); lower "
                "accumulate_grad_batches or batch_size, or give --scale_lr False",
                images, "a whole epoch" if accumulate >= batches else "the largest batches", pl_module.learning_rate,
                scaled_for, factors,
            )  # fmt: skip
        elif accumulate != first and images != scaled_for:
            log.warning(
                "A step has %d images from epoch %d on, which accumulates %d batches, but the learning rate %.3e stays "
                "scaled for %d (%s); give a scheduler_config to change it, or --scale_lr False",
                images, trainer.current_epoch, accumulate, pl_module.learning_rate, scaled_for, factors,
            )  # fmt: skip

    def _largest_step(self, trainer: Trainer, batches: int) -> int:
        """Return the largest number of images of a step of `batches` batches."""
        images = batches * trainer.world_size * self.scaled_batch
        largest = getattr(getattr(trainer.train_dataloader, "batch_sampler", None), "largest_step", None)
        return images if largest is None else min(images, largest(batches))

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
