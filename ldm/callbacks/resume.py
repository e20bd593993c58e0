"""Callbacks for resumed runs: learning rates and optimizer settings of the present config, and a last warning."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ldm.callbacks.optimizer_settings import Settings, check_state, number, settings_of, use_settings

log = logging.getLogger(__name__)


class LearningRateOnResume(Callback):
    """Callback that gives a resumed run the learning rates and the optimizer settings of its present config.

    Otherwise the optimizer would use the saved ones, even the last rate of a schedule that the config no longer has.
    The callback records the rates of the newly made optimizer before the checkpoint's state is loaded. A `LambdaLR`
    continues at its saved step with the multiplier of the present config. A schedule that is not in the checkpoint
    starts at its first step.
    """

    def __init__(self) -> None:
        self._is_resumed = False
        self._saved: float | None = None
        self._schedules = 0  # number in the checkpoint
        self._made: list[Settings] = []  # per optimizer

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["learning_rate"] = pl_module.learning_rate

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._is_resumed = bool(checkpoint["optimizer_states"])
        self._schedules = len(checkpoint["lr_schedulers"])
        self._saved = checkpoint.get("learning_rate")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the settings of the optimizers, which are made but have not loaded their state."""
        self._made = [settings_of(optimizer) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rates and the optimizer settings.

        Raises:
            UserError: the loaded state does not belong to the optimizers of the config.
        """
        if not self._is_resumed:
            return
        saved, now = self._saved, pl_module.learning_rate
        if saved and saved != now:
            log.info("The learning rate was %.3e in the checkpoint; it is %.3e now", saved, now)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        if len(schedules) != self._schedules:
            what = "has none" if not schedules else "starts its schedule now"
            log.info("The checkpoint has %d learning rate schedules; the run %s", self._schedules, what)
        for optimizer, made in zip(trainer.optimizers, self._made, strict=True):
            use_settings(optimizer, made)
            check_state(optimizer)
            own = next((schedule for schedule in schedules if schedule.optimizer is optimizer), None)
            self._set_rates(optimizer, made, own)

    def _set_rates(self, optimizer: Optimizer, made: Settings, schedule: LRScheduler | None) -> None:
        bases = [group.get("initial_lr", group["lr"]) for group in made]
        if schedule is not None and not isinstance(schedule, LambdaLR):
            if not self._saved or not self._schedules:
                return
            # Another kind of schedule: its rate follows from its state alone, so only the base is changed.
            ratios = [base / old if old else 1.0 for base, old in zip(bases, schedule.base_lrs, strict=True)]
            schedule.base_lrs = bases
            rates = [group["lr"] * ratio for group, ratio in zip(optimizer.param_groups, ratios, strict=True)]
        elif schedule is not None:
            schedule.base_lrs = bases
            multipliers = [multiplier(schedule.last_epoch) for multiplier in schedule.lr_lambdas]
            rates = [base * multiplier for base, multiplier in zip(bases, multipliers, strict=True)]
        else:
            rates = bases
        for group, base, rate in zip(optimizer.param_groups, bases, rates, strict=True):
            _set(group, "lr", rate)
            if schedule is None:
                group.pop("initial_lr", None)
            else:
                _set(group, "initial_lr", base)


def _set(group: dict[str, Any], key: str, rate: float) -> None:
    if isinstance(group.get(key), Tensor):  # some optimizers read it on the device
        group[key].fill_(rate)
    else:
        group[key] = number(rate)


class NoStepsLeft(Callback):
    """Callback that warns if a run has no steps left, which Lightning does not report."""

    def __init__(self) -> None:
        self._started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._started:
            limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
            if trainer.limit_train_batches == 0:
                limits = {"limit_train_batches": 0}
            given = ", ".join(f"{name}={limit}" for name, limit in limits.items() if limit not in (None, -1))
            log.warning(
                "No training: the run is already at step %d (%s); raise the limit to continue",
                trainer.global_step,
                given,
            )
