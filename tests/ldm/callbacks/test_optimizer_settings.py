"""Tests of the settings of a resumed optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_optimizer import CAME, Lion, Prodigy
from torch import nn
from torch.optim import Adafactor, Adam, AdamW, Optimizer, RMSprop

from ldm.callbacks.optimizer_settings import check_state, settings_of, use_settings
from ldm.util import UserError


def stepped(cls: type[Optimizer], weight: nn.Parameter, **settings) -> Optimizer:
    optimizer = cls([weight], lr=0.1, **settings)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def resumed(cls: type[Optimizer], weight: nn.Parameter, saved: Optimizer, **settings) -> Optimizer:
    optimizer = cls([weight], lr=0.1, **settings)
    made = settings_of(optimizer)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    use_settings(optimizer, made)
    check_state(optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"weight_decay": 0.5}),
        ({"weight_decay": 0.5}, {"weight_decay": 0.0}),
        ({"fused": True}, {"betas": [0.5, 0.6], "eps": 1e-2}),
        ({"amsgrad": True}, {}),
        ({"foreach": True}, {"fused": True, "weight_decay": 0.5}),
    ],
)
def test_use_settings_makes_the_next_step_that_of_the_new_settings(before, now) -> None:
    weight = nn.Parameter(torch.linspace(1, 2, 8))
    saved = stepped(AdamW, weight, **before)
    twin = nn.Parameter(weight.detach().clone())
    expected = AdamW([twin], lr=0.1, **now)
    moments = {key: value.clone() for key, value in saved.state[weight].items() if key != "max_exp_avg_sq"}
    expected.state[twin] = moments
    optimizer = resumed(AdamW, weight, saved, **now)
    for parameter, each in ((weight, optimizer), (twin, expected)):
        parameter.grad = torch.linspace(-1, 1, 8)
        each.step()
    torch.testing.assert_close(weight, twin)


def test_use_settings_keeps_rates_and_the_kind_of_weight_decay() -> None:
    weight = nn.Parameter(torch.ones(3))
    saved = stepped(Adam, weight)
    saved.param_groups[0]["lr"] = 0.7
    optimizer = resumed(AdamW, weight, saved)
    assert optimizer.param_groups[0]["lr"] == 0.7 and optimizer.param_groups[0]["decoupled_weight_decay"]
    optimizer = resumed(Adam, weight, optimizer)
    assert not optimizer.param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize(
    ("cls", "now", "said"),
    [
        (RMSprop, {}, "has no alpha, as RMSprop does; keep the optimizer of the run, or start a new run"),
        (AdamW, {"amsgrad": True}, "has amsgrad=False, not True; keep the optimizer of the run, or start a new run"),
    ],
)
def test_use_settings_refuses_settings_whose_moments_are_missing(cls, now, said) -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=said):
        resumed(cls, weight, stepped(AdamW, weight), **now)


def test_values_that_an_optimizer_keeps_in_its_groups_stay_or_are_refused() -> None:
    class Counting(AdamW):
        def __init__(self, params, lr) -> None:
            super().__init__(params, lr)
            self.param_groups[0]["seen"] = 0

    weight = nn.Parameter(torch.ones(3))
    saved = Counting([weight], lr=0.1)
    saved.param_groups[0]["seen"] = 5
    assert resumed(Counting, weight, saved).param_groups[0]["seen"] == 5
    saved.param_groups[0]["seen"] = "five"
    with pytest.raises(UserError, match="has seen='five' but the config's has 0; the file may be damaged"):
        resumed(Counting, weight, saved)


@pytest.mark.parametrize("cls", [Adafactor, CAME])
def test_check_state_takes_factored_moments_of_matrices_and_whole_ones_of_vectors(cls) -> None:
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((3,), (3, 4), (2, 3, 4, 5))]
    optimizer = cls(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    check_state(optimizer)
    row = next(key for key, value in optimizer.state[weights[1]].items() if value.numel() == 3)
    optimizer.state[weights[1]][row] = torch.ones(2)
    with pytest.raises(UserError, match=rf"has {row} of shape \(2,\) for a parameter of shape \(3, 4\)"):
        check_state(optimizer)


def test_use_settings_keeps_the_rate_that_prodigy_estimated() -> None:
    weight = nn.Parameter(torch.ones(3))
    saved = stepped(Prodigy, weight)
    saved.param_groups[0]["d"] = 0.25
    optimizer = resumed(Prodigy, weight, saved, weight_decay=0.5)
    group = optimizer.param_groups[0]
    assert (group["d"], group["step"], group["weight_decay"]) == (0.25, 2, 0.5)


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [(AdamW, Lion, "eps"), (CAME, Lion, "eps1"), (Prodigy, Lion, "eps"), (Prodigy, CAME, "eps1")],
)
def test_use_settings_refuses_the_state_of_another_optimizer(before, now, key) -> None:
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=f"the checkpoint's optimizer has (no )?{key}, (which|as) {now.__name__} does"):
        resumed(now, weight, stepped(before, weight))
