"""Schedules of the learning rate from configs, as multipliers by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ldm.lr_scheduler import TORCH_SCHEDULES
from ldm.util import check_choice, check_keys, get_obj_from_str, instantiate_from_config, located, refuse_if, takes

_WHERE = "scheduler_config"
_TORCH = "torch.optim.lr_scheduler."
# Argument that is the length of the run by default, by class.
_LENGTHS = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps"}
_ANY_LENGTH = 1000  # before the first step, at which no schedule depends on its length

Count = Callable[[], int]


def _unknown() -> int:
    raise AssertionError("the length is unknown")


def build_schedule(
    config: Mapping[str, Any], rate: float | None = None, epoch: Count = _unknown, run: Count = _unknown
) -> Callable[[int], float]:
    """Build the multiplier of the learning rate, by step, that `config` describes.

    `config` has `target` and `params`, and `interval`: `step`, or `epoch` if the numbers in `params` are epochs.

    Args:
        rate: the learning rate; None for a model with several, which takes multipliers by step alone.
        epoch, run: functions that return the numbers of optimizer steps. They are first called for step 1.

    Raises:
        UserError: the target does not exist, does not take its `params`, or is no schedule of a run.
    """
    if isinstance(config, Mapping):
        check_keys(_WHERE, config, ("target", "params", "interval"))
        check_choice(f"{_WHERE}.interval", config.get("interval") or "step", ("step", "epoch"))
    in_epochs, is_torch = config.get("interval") == "epoch", str(config.get("target")).startswith(_TORCH)
    refuse_if(
        rate is None and (in_epochs or is_torch),
        f"{_WHERE}: this model has several rates; name a class of ldm.lr_scheduler, with interval: step",
    )
    described = {key: value for key, value in config.items() if key != "interval"}
    with located(_WHERE):
        if is_torch:
            schedule = TorchSchedule(described, rate, lambda: -(-run() // epoch()) if in_epochs else run()).schedule
            return (lambda n: schedule(n // epoch() if n else 0)) if in_epochs else schedule
        multiplier = instantiate_from_config(described)
    schedule = getattr(multiplier, "schedule", None)
    refuse_if(schedule is None, f"{_WHERE}: {config['target']} is no multiplier; name a class of ldm.lr_scheduler")
    return (lambda n: schedule(n / epoch() if n else 0)) if in_epochs else schedule


class TorchSchedule:
    """Multiplier with the values of a class of `torch.optim.lr_scheduler`.

    Rates in `params` are absolute, as in torch. `OneCycleLR` rises to `rate` unless `max_lr` is given. It keeps the
    betas of the optimizer, and stays at its last value. The length of `OneCycleLR` and `CosineAnnealingLR` is that of
    the run unless `params` has it.

    Args:
        config: `target` and `params`.
        rate: the learning rate.
        length: function that returns the length of the run. It is first called for a step other than 0.

    Raises:
        UserError: the class schedules no rate by step, or does not take its `params`.
    """

    def __init__(self, config: Mapping[str, Any], rate: float, length: Count) -> None:
        target = config["target"]
        name = target.removeprefix(_TORCH)
        refuse_if(
            name not in TORCH_SCHEDULES,
            f"{target}: needs other schedules, functions or metrics; name a class of ldm.lr_scheduler, or one of "
            f"{', '.join(TORCH_SCHEDULES)} of torch",
        )
        params = {key: value for key, value in (config.get("params") or {}).items() if value is not None}
        refuse_if(
            takes(get_obj_from_str(target), "cycle_momentum") and params.setdefault("cycle_momentum", False),
            f"{target}: cycle_momentum changes the optimizer's betas; set it to false",
        )
        if name == "OneCycleLR":
            params.setdefault("max_lr", rate)
        self._missing = None if {"epochs", "total_steps", "T_max"} & params.keys() else _LENGTHS.get(name)
        self._config, self._rate, self._length = {"target": target, "params": params}, rate or 1.0, length
        self._values = [self._begin(_ANY_LENGTH)]

    def _begin(self, length: int) -> float:
        """Build the schedule, with the given length if it has no other, and return its first multiplier."""
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=self._rate)
        given = {} if self._missing is None else {self._missing: length}
        self._scheduler: LRScheduler = instantiate_from_config(self._config, optimizer=self._optimizer, **given)
        return self._multiplier()

    def _multiplier(self) -> float:
        return self._optimizer.param_groups[0]["lr"] / self._rate

    def schedule(self, n: int) -> float:
        """Return the multiplier at step `n`."""
        if n and len(self._values) == 1 and self._missing:
            self._begin(self._length())
        n = min(n, getattr(self._scheduler, "total_steps", n + 1) - 1)
        while len(self._values) <= n:
            self._optimizer.step()
            self._scheduler.step()
            self._values.append(self._multiplier())
        return self._values[n]
