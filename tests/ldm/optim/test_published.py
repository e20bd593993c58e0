"""Tests of optimizers of other packages: what a config may give them, and their steps inside backward."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from torch import nn

from ldm.optim import InBackward, build_optimizer
from ldm.util import UserError
from tests.ldm.optim.tiny_training import tiny_unet, train

LION, CAME, PRODIGY = (f"pytorch_optimizer.{name}" for name in ("Lion", "CAME", "Prodigy"))
ADAFACTOR = "torch.optim.Adafactor"


def built(target: str, module: nn.Module, **params: Any) -> torch.optim.Optimizer:
    return build_optimizer({"target": target, "params": params}, module.parameters(), 1e-3, "optimizer_config")


@pytest.mark.parametrize("target", [LION, CAME, ADAFACTOR])
def test_inside_backward_the_step_and_the_state_are_those_of_the_plain_optimizer(target: str) -> None:
    one, other = tiny_unet(), tiny_unet()
    expected = built(target, one)
    optimizer = InBackward(other.parameters(), lr=1e-3, optimizer={"target": target}, bucket_mb=0.1)
    for steps in (range(2), range(2, 3)):
        train(one, expected, steps, 2)
        train(other, optimizer, steps, 2)
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(dict(other.named_parameters()), dict(one.named_parameters()), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_lion_steps_by_the_sign_of_the_interpolated_gradient() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 4.0]))
    optimizer = build_optimizer({"target": LION, "params": {"weight_decay": 0.5}}, [weight], 0.1, "optimizer_config")
    for gradient in ([1.0, -3.0, 0.5], [-1.0, -1.0, -0.01]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    # By hand: w ← 0.95·w − 0.1·sign(0.9·m + 0.1·g), then m ← 0.99·m + 0.01·g.
    # First, m = 0, so the signs are +, −, +: 0.85, −1.8, 3.7, and m = 0.01, −0.03, 0.005.
    # Second, 0.9·m + 0.1·g = −0.091, −0.127, 0.0035.
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9075, -1.61, 3.415]))


@pytest.mark.parametrize("target", [PRODIGY, "torch.optim.LBFGS"])
def test_an_optimizer_that_needs_all_gradients_is_refused_inside_backward(target: str) -> None:
    with pytest.raises(UserError, match=f"optimizer: {target} cannot step during backward, because .* all parameters"):
        built("ldm.optim.InBackward", nn.Linear(2, 2), optimizer={"target": target, "params": {"lr": 1.0}})


def test_an_optimizer_with_other_weights_in_training_is_refused() -> None:
    with pytest.raises(UserError, match=r"^optimizer_config: pytorch_optimizer.ScheduleFreeAdamW: .*use_ema=True"):
        built("pytorch_optimizer.ScheduleFreeAdamW", nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("target", "key", "hint"),
    [
        (LION, "weight_decy", "weight_decay"),
        (CAME, "clip_treshold", "clip_threshold"),
        (PRODIGY, "d_coeff", "d_coef"),
        (LION, "defaults", ""),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(target: str, key: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"^optimizer_config: unknown key '{key}' in params of {target}.*{hint}"):
        built(target, nn.Linear(2, 2), **{key: 1.0})


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"no module named 'pytorch_optimizer'; .* pip install .* '\.\[optimizers\]'"):
        built(LION, nn.Linear(2, 2))


def test_a_rate_of_prodigy_for_another_optimizer_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(PRODIGY, nn.Linear(2, 2), lr=1.0)
        assert not caplog.messages
        built(PRODIGY, nn.Linear(2, 2))
    assert ["set model.params.optimizer_config.params.lr=1" in message for message in caplog.messages] == [True]


def test_prodigy_has_one_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in (1.0, 0.5)]
    with pytest.raises(UserError, match="one learning rate for all parameters; give one instead of 2"):
        build_optimizer({"target": PRODIGY}, groups, 1.0, "optimizer_config")
