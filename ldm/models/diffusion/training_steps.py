"""Training, validation and optimizer steps of diffusion models, as Lightning hooks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.distributed.collectives import mean_over_processes
from ldm.models.diffusion.batch import Batch
from ldm.models.diffusion.conditioning_dropout import Replacement, replaced
from ldm.optim import build_optimizer, build_schedule
from ldm.optim.parts import TrainedParts
from ldm.util import refuse_if

log = logging.getLogger(__name__)


class TrainingSteps:
    """Mixin of a diffusion model for the steps around `shared_step`. It must precede Lightning's module."""

    model: nn.Module
    model_ema: nn.Module
    use_ema: bool
    first_stage_key: str
    learning_rate: float | None
    optimizer_config: Mapping[str, Any] | None
    scheduler_config: Mapping[str, Any] | None
    replacements: Mapping[str, Replacement]
    trained_parts = TrainedParts()  # all

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, logged = self.shared_step(replaced(batch, self.replacements, self.device))
        # One reduction for all values. `sync_dist` would reduce each value by itself.
        means = mean_over_processes(torch.stack(list(logged.values())))
        self.log_dict(dict(zip(logged, means, strict=True)), batch_size=self.batch_size_of(batch))
        return loss

    def batch_size_of(self, batch: Batch) -> int:
        """Return the number of samples in a batch."""
        return len(batch[self.first_stage_key])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses with the weights and with their EMA.

        Noise and timestep of a sample are the same in every epoch. They depend on its number in the set, or else, as in
        streamed shards, on the number of its batch.
        """
        self._log_evaluation(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_evaluation(batch, batch_idx, "test")

    def _log_evaluation(self, batch: Batch, batch_idx: int, split: str) -> None:
        averaged = None
        if self.use_ema:
            with self.ema_scope():
                averaged = self._validation_losses(batch, batch_idx)
        losses = self._validation_losses(batch, batch_idx)  # the last, whose `sample_losses` callbacks read
        averaged = averaged or losses  # the name with `_ema` exists without an EMA too, for `monitor`
        losses = losses | {f"{key}_ema": value for key, value in averaged.items()}
        logged = {key.replace("val/", f"{split}/", 1): value for key, value in losses.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=self.batch_size_of(batch))

    def _validation_losses(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(batch_idx)
            return self.shared_step(batch)[1]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step the optimizer and then the EMA, so that a checkpoint written after the step holds both."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning would keep the gradients until the next backward pass
        if self.use_ema:
            self.model_ema(self.model)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the optimizer, in order."""
        return [*self.model.parameters(), *self.parameters(recurse=False)]

    def configure_optimizers(self) -> Any:
        """Return the optimizer of `optimizer_config` (default: fused AdamW) and the schedule of `scheduler_config`.

        Raises:
            UserError: the learning rate is missing, or the optimizer does not take its `params`.
        """
        refuse_if(self.learning_rate is None, "no learning rate: set model.base_learning_rate in the config")
        config = self.optimizer_config or {"target": "torch.optim.AdamW", "params": {"fused": True}}
        rate, rates = self.learning_rate, self.trained_parts.rates(self)
        optimizer = build_optimizer(config, self.trained_parameters(), rate, "optimizer_config", rates)
        if not self.scheduler_config:
            return optimizer
        multiplier = build_schedule(self.scheduler_config, rate, self._steps_of_epoch, self._steps_of_run)
        scheduler = LambdaLR(optimizer, lr_lambda=multiplier)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    def on_train_start(self) -> None:
        """Log the parts that train, and check that the schedule gets the lengths of epoch and run that it needs."""
        self.trained_parts.log(self, self.trainer.optimizers[0])
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.lr_lambdas[0](1)
        if (self.scheduler_config or {}).get("interval") == "epoch":
            steps = self._steps_of_epoch()
            done = self.global_step / steps
            log.info("The schedule counts epochs of %d optimizer steps; %.2f of them are done", steps, done)

    def _steps_of_epoch(self) -> int:
        """Return the number of optimizer steps in an epoch, after Lightning has made the data loader."""
        batches = self.trainer.num_training_batches
        refuse_if(math.isinf(batches), "scheduler_config: streamed data have no known epoch; count in steps")
        refuse_if(
            any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks),
            "scheduler_config: GradientAccumulationScheduler changes the number of steps per epoch; count in steps",
        )
        return math.ceil(batches / self.trainer.accumulate_grad_batches)  # the last step may have fewer batches

    def _steps_of_run(self) -> int:
        """Return the number of optimizer steps until `max_steps` or `max_epochs`."""
        limits = [self.trainer.max_steps] if self.trainer.max_steps > 0 else []
        if (self.trainer.max_epochs or -1) > 0:
            limits.append(self.trainer.max_epochs * self._steps_of_epoch())
        refuse_if(not limits, "scheduler_config: the run has no last step; give --max_steps or --max_epochs")
        return min(limits)
