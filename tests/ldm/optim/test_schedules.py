"""Schedules from configs, against values by hand and against the classes of torch with an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ldm.optim import build_schedule
from ldm.util import UserError

RATE = 1e-5


def built(
    name: str, interval: str | None = None, run: int = 8, epoch: int = 4, **params: Any
) -> Callable[[int], float]:
    package = "ldm.lr_scheduler" if name.startswith("Lambda") else "torch.optim.lr_scheduler"
    config = {"target": f"{package}.{name}", "params": params, **({"interval": interval} if interval else {})}
    return build_schedule(config, RATE, lambda: epoch, lambda: run)


@pytest.mark.parametrize(
    ("name", "params", "others"),
    [
        ("ConstantLR", {"factor": 0.5, "total_iters": 3}, {}),
        ("CosineAnnealingLR", {"eta_min": 1e-6}, {"T_max": 8}),
        ("CosineAnnealingLR", {"T_max": 5}, {}),
        ("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 2}, {}),
        ("CyclicLR", {"base_lr": 1e-6, "max_lr": 2e-5, "step_size_up": 3}, {"cycle_momentum": False}),
        ("ExponentialLR", {"gamma": 0.9}, {}),
        ("LinearLR", {"start_factor": 0.1, "total_iters": 4}, {}),
        ("MultiStepLR", {"milestones": [2, 5], "gamma": 0.5}, {}),
        ("OneCycleLR", {}, {"max_lr": RATE, "total_steps": 8, "cycle_momentum": False}),
        ("OneCycleLR", {"max_lr": 3e-5, "total_steps": 20}, {"cycle_momentum": False}),
        ("PolynomialLR", {"total_iters": 6, "power": 2.0}, {}),
        ("StepLR", {"step_size": 3}, {}),
    ],
)
def test_the_rates_are_those_of_torch(name: str, params: dict, others: dict) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    expected = getattr(torch.optim.lr_scheduler, name)(optimizer, **params, **others)
    multiplier = built(name, **params)
    for step in range(8):
        assert RATE * multiplier(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        optimizer.step()
        expected.step()
    resumed = built(name, **params)
    assert resumed(5) == multiplier(5)  # the value depends on the step alone


def test_one_cycle_holds_its_end() -> None:
    multiplier = built("OneCycleLR", total_steps=8)
    assert multiplier(2) < 1 and multiplier(7) == multiplier(8) == multiplier(100) == pytest.approx(1 / 25e4)


def test_epochs_of_torch_change_at_their_end() -> None:
    multiplier = built("StepLR", "epoch", step_size=1, gamma=0.5)
    assert [multiplier(step) for step in (0, 3, 4, 7, 8)] == [1, 1, 0.5, 0.5, 0.25]
    assert built("CosineAnnealingLR", "epoch", run=9)(4) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))


def test_a_warm_up_in_epochs_rises_with_each_step() -> None:
    params = {"lr_start": 0.0, "lr_max": 1.0, "lr_min": 0.0, "warm_up_steps": 0.5, "max_decay_steps": 2.5}
    multiplier = built("LambdaWarmUpCosineScheduler", "epoch", **params)
    assert [multiplier(step) for step in (0, 1, 2, 6, 10, 12)] == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    restarts = {"f_start": [0.0] * 2, "f_max": [1.0] * 2, "f_min": [0.0] * 2}
    multiplier = built(
        "LambdaWarmUpCosineScheduler2", "epoch", warm_up_steps=[0.5] * 2, cycle_lengths=[1.5] * 2, **restarts
    )
    assert [multiplier(step) for step in (2, 4, 6, 8, 12)] == pytest.approx([1, 0.5, 0, 1, 0])


def test_lengths_are_asked_for_after_the_first_step() -> None:
    def unknown() -> int:
        raise UserError("the length is unknown")

    one_cycle = {"target": "torch.optim.lr_scheduler.OneCycleLR"}
    for config in (one_cycle, {**one_cycle, "params": {"total_steps": 5}, "interval": "epoch"}):
        multiplier = build_schedule(config, RATE, unknown, unknown)
        assert multiplier(0) == pytest.approx(0.04)
        with pytest.raises(UserError, match="unknown"):
            multiplier(1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target": "torch.optim.lr_scheduler.SequentialLR"}, "needs other schedules, functions or metrics"),
        ({"target": "torch.optim.lr_scheduler.StepLR"}, "step_size"),
        ({"target": "torch.optim.lr_scheduler.StepLR", "params": {"step": 3}}, "unknown key 'step' in params"),
        ({"target": "torch.optim.lr_scheduler.OneCycleLR", "params": {"cycle_momentum": True}}, "set it to false"),
        ({"target": "torch.optim.lr_scheduler.OneCycleLR", "interval": "epochs"}, "did you mean 'epoch'?"),
        ({"target": "torch.optim.lr_scheduler.OneCycleLR", "frequency": 2}, "unknown key 'frequency'"),
        ({"target": "torch.nn.Identity"}, "is no multiplier; name a class of ldm.lr_scheduler"),
    ],
)
def test_mistakes(config: dict, said: str) -> None:
    with pytest.raises(UserError) as refused:
        build_schedule(config, RATE, lambda: 4, lambda: 8)
    assert said in str(refused.value) and str(refused.value).startswith(("scheduler_config", "unknown key"))


def test_a_model_with_several_rates_takes_multipliers_by_step_alone() -> None:
    for config in ({"target": "torch.optim.lr_scheduler.StepLR"}, {"target": "x.Y", "interval": "epoch"}):
        with pytest.raises(UserError, match="this model has several rates"):
            build_schedule(config)
