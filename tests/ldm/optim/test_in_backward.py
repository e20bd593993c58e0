"""Stepping inside backward: the same bits as stepping after it, with less in memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.optim import InBackward
from ldm.util import UserError
from tests.ldm.optim.tiny_training import tiny_loss, tiny_unet, train

ADAMW = {"target": "torch.optim.AdamW", "params": {"fused": True}}
BUCKET_MB = 0.1  # of 0.8 MiB of gradients


def in_backward(module: nn.Module, **params: Any) -> InBackward:
    return InBackward(module.parameters(), **{"lr": 1e-3, "optimizer": ADAMW, "bucket_mb": BUCKET_MB, **params})


def plain(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    differences = {
        name: (a - b).abs().max().item()
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True)
    }
    assert max(differences.values()) == 0.0, differences


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_it_equals_plain_steps_bit_for_bit(accumulate: int) -> None:
    one, other = tiny_unet(), tiny_unet()
    expected, optimizer = plain(one), in_backward(other)
    train(one, expected, range(3), accumulate, halving(expected))
    train(other, optimizer, range(3), accumulate, halving(optimizer))
    assert optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"] == 1e-3 / 8
    assert_same_weights(one, other)


def test_it_equals_plain_steps_after_a_resume(tmp_path: Path) -> None:
    one, other = tiny_unet(), tiny_unet()
    expected, optimizer = plain(one), in_backward(other)
    schedules = halving(expected), halving(optimizer)
    train(one, expected, range(4), schedule=schedules[0])
    train(other, optimizer, range(2), schedule=schedules[1])
    content = {
        "weights": other.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedules[1].state_dict(),
    }
    save_checkpoint(content, tmp_path / "half-way.ckpt")

    saved = load_checkpoint(tmp_path / "half-way.ckpt")
    resumed = tiny_unet()
    resumed.load_state_dict(saved["weights"])
    optimizer = in_backward(resumed)
    schedule = halving(optimizer)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    train(resumed, optimizer, range(2, 4), schedule=schedule)
    assert_same_weights(one, resumed)


def test_its_state_is_the_inner_optimizers() -> None:
    one, other = tiny_unet(), tiny_unet()
    expected, optimizer = plain(one), in_backward(other)
    train(one, expected, range(2))
    train(other, optimizer, range(2))
    optimizer_of_resumed_plain_run = plain(other)
    optimizer_of_resumed_plain_run.load_state_dict(optimizer.state_dict())
    train(one, expected, range(2, 3))
    train(other, optimizer_of_resumed_plain_run, range(2, 3))
    assert_same_weights(one, other)


def test_groups_keep_their_own_settings() -> None:
    one, other = tiny_unet(), tiny_unet()

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        early, late = list(module.parameters())[:20], list(module.parameters())[20:]
        return [{"params": early, "weight_decay": 0.5}, {"params": late, "lr": 1e-2}]

    expected = torch.optim.AdamW(groups(one), lr=1e-3, fused=True)
    optimizer = InBackward(groups(other), lr=1e-3, optimizer=ADAMW, bucket_mb=BUCKET_MB)
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the groups
    train(one, expected, range(2))
    train(other, optimizer, range(2))
    assert_same_weights(one, other)
    assert [len(group["params"]) for group in optimizer.param_groups] == [20, len(list(other.parameters())) - 20]


def test_few_gradients_exist_at_a_time() -> None:
    unet = tiny_unet()
    optimizer = in_backward(unet)
    held, stepped = [], []
    step = optimizer.inner.step

    def watched() -> None:
        held.append(sum(p.grad.nbytes for p in unet.parameters() if p.grad is not None))
        stepped.append(sum(len(group["params"]) for group in optimizer.inner.param_groups))
        step()

    optimizer.inner.step = watched
    train(unet, optimizer, range(1))
    largest = max(parameter.nbytes for parameter in unet.parameters())
    assert max(held) <= optimizer.bucket_bytes + largest < 0.3 * sum(p.nbytes for p in unet.parameters())
    assert sum(stepped) == len(list(unet.parameters()))
    assert len(stepped) < sum(stepped) / 3  # not one call a parameter
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_each_gradient_is_clipped_by_itself() -> None:
    small, large = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    sgd = {"target": "torch.optim.SGD"}
    optimizer = InBackward([small, large], lr=1.0, optimizer=sgd, clip_each=5.0)

    def closure() -> torch.Tensor:
        loss = (small * torch.tensor([0.3, 0.4])).sum() + (large * torch.tensor([30.0, 40.0])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0.0
    torch.testing.assert_close(small, torch.tensor([-0.3, -0.4]))
    torch.testing.assert_close(large, torch.tensor([-3.0, -4.0]))  # norm 50 → 5


def test_a_parameter_that_only_an_earlier_batch_reached_is_stepped() -> None:
    used, unused = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = InBackward([used, unused], lr=1.0, optimizer={"target": "torch.optim.SGD"})
    (used + unused).sum().backward()
    optimizer.step(lambda: used.sum().backward())
    assert (used.item(), unused.item()) == (-2.0, -1.0)


def test_frozen_parameters_stay() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    before = module.bias.clone()
    optimizer = in_backward(module)
    optimizer.step(lambda: module(torch.ones(1, 2)).sum().backward())
    assert torch.equal(module.bias, before)


def test_a_failed_backward_leaves_no_hooks_and_no_bucket() -> None:
    module = tiny_unet()
    optimizer = in_backward(module, bucket_mb=32)

    def closure() -> None:
        tiny_loss(module, 0).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    optimizer.zero_grad()
    train(module, optimizer, range(1))
    expected = tiny_unet()
    train(expected, plain(expected), range(1))
    assert_same_weights(expected, module)
    tiny_loss(module, 0).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_two_backward_passes_in_one_step_are_refused() -> None:
    unet = tiny_unet()
    optimizer = in_backward(unet)

    def closure() -> None:
        tiny_loss(unet, 0).backward()
        tiny_loss(unet, 1).backward()

    with pytest.raises(RuntimeError, match="second backward pass"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bucket_mb": 0}, "bucket_mb 0: give a number above 0"),
        ({"clip_each": -1.0}, "clip_each -1.0: give a number above 0"),
        ({"optimizer": {"target": "torch.optim.AdamWW"}}, "optimizer: .*did you mean 'AdamW'"),
        ({"optimizer": {**ADAMW, "params": {"weight_decai": 0.1}}}, "optimizer: .*did you mean 'weight_decay'"),
    ],
)
def test_mistakes_are_told(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        in_backward(nn.Linear(2, 2), **params)


def test_gradients_of_two_devices_are_taken_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer, within = in_backward(module, bucket_mb=1e-6), []

    def step() -> None:
        within.append(1)
        time.sleep(0.001)
        assert len(within) == 1
        within.clear()

    monkeypatch.setattr(optimizer.inner, "step", step)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(optimizer._take, list(module.parameters())))
    assert all(parameter.grad is None for parameter in module.parameters())
