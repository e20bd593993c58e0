"""Learning rate and remaining steps of a resumed run."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

log = logging.getLogger(__name__)


class LearningRateOnResume(Callback):
    """Callback that gives a resumed run the learning rate and the schedule of its present config.

    Lightning restores the optimizer's groups, with the rates that the former schedule left there. This callback sets
    each to the configured rate, times the present schedule at the restored step. A run without a schedule has the
    configured rate. A schedule that the checkpoint does not hold begins at its start.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["learning_rate"] = pl_module.learning_rate

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = {"schedules": len(checkpoint.get("lr_schedulers") or []), "step": checkpoint["global_step"]}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is None:
            return
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if len(schedulers) != self._resumed["schedules"] and self._resumed["step"] > 0 and trainer.is_global_zero:
            change = "begins at its start" if schedulers else "of the checkpoint is dropped"
            log.info("The learning rate schedule %s: the config has changed since the checkpoint", change)
        for optimizer in trainer.optimizers:
            before = [float(group["lr"]) for group in optimizer.param_groups]
            _set_rates(optimizer, next((s for s in schedulers if s.optimizer is optimizer), None))
            after = [float(group["lr"]) for group in optimizer.param_groups]
            if before != after and trainer.is_global_zero:
                log.info("The learning rate was %.3e in the checkpoint, and is %.3e from here on", before[0], after[0])


def _set_rates(optimizer: Optimizer, scheduler: Any) -> None:
    """Set the rates of all groups from the optimizer's `configured_rates`; other schedules than LambdaLR stay."""
    rates = getattr(optimizer, "configured_rates", None)
    if rates is None or len(rates) != len(optimizer.param_groups):
        return
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = list(rates)
        factors = (multiplier(scheduler.last_epoch) for multiplier in scheduler.lr_lambdas)
        now = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        scheduler._last_lr = list(now)
    elif scheduler is None:
        now = rates
    else:
        return
    for group, rate, initial in zip(optimizer.param_groups, now, rates, strict=True):
        if isinstance(group["lr"], Tensor):  # some optimizers read it on the device
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if scheduler is None:
            group.pop("initial_lr", None)
        else:
            group["initial_lr"] = initial


class NothingLeft(Callback):
    """Callback that says when a resumed run had all its steps already, which Lightning skips silently."""

    def __init__(self) -> None:
        self._started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._started:
            limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
            given = ", ".join(f"{name}={limit}" for name, limit in limits.items() if limit not in (None, -1))
            log.warning("Nothing was trained: already at step %d (%s)", trainer.global_step, given)
