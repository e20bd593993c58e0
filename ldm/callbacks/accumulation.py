"""Gradient accumulation at the end of an epoch, and gradient clipping of fused optimizers."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

log = logging.getLogger(__name__)


class MeanOfAccumulated(Callback):
    """Callback that makes the gradient of a step the mean over the batches that the step has.

    Lightning divides each loss by `accumulate_grad_batches`. The last step of an epoch may have fewer batches, and its
    gradient would be too small by that ratio. At the last batch of such a step, this callback scales the gradients of
    the earlier batches and the loss.
    """

    def __init__(self) -> None:
        self._factor = 1.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
        if batches < accumulate and trainer.is_global_zero:
            log.warning(
                "An epoch has %d of the %d batches that accumulate_grad_batches asks for: each step is the mean of %d. "
                "A scaled learning rate counts %d; lower accumulate_grad_batches to %d, or set the rate with "
                "--scale_lr False",
                *(batches, accumulate, batches, accumulate, batches),
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        accumulate = trainer.accumulate_grad_batches
        batches = batch_idx % accumulate + 1  # of this step so far
        self._factor = accumulate / batches if trainer.is_last_batch else 1.0
        if self._factor == 1.0 or not pl_module.automatic_optimization:
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._factor)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._factor != 1.0 and pl_module.automatic_optimization:
            loss.mul_(self._factor)  # in place: autograd differentiates this very tensor


class ClippedBeforeFused(Callback):
    """Callback that lets gradients of a fused optimizer be clipped.

    A fused optimizer removes the loss scale of float16 inside its step, so Lightning refuses to clip before it. Without
    this offer the gradient scaler removes the scale first, and bfloat16 has no scale at all.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.gradient_clip_val:
            for optimizer in trainer.optimizers:
                optimizer._step_supports_amp_scaling = False
