"""Tests of the low-bit step on the host: torchao's arithmetic, in chunks, and the noise that rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from ldm.optim.host_step import _CHUNK, own_noise, shared_noise, step_on_host

SETTINGS = {"lr": torch.tensor(1e-3), "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
NAMES = ("exp_avg", "exp_avg_sq")


def moments(kind: type, count: int, block: int) -> dict[str, Any]:
    return {name: kind.zeros((count,), name == "exp_avg", block) for name in NAMES}


@pytest.fixture(autouse=True)
def one_thread():
    """So that no kernel ends in the middle of a vector of numbers, whose rest it would round in another way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "block"), [(OptimState8bit, 256), (OptimState4bit, 128)])
def test_the_step_is_torchaos_bit_for_bit(kind: type, block: int, dtype: torch.dtype) -> None:
    count = _CHUNK + 3 * block  # more than one chunk
    torch.manual_seed(0)
    expected = torch.randn(count).to(dtype)
    own = nn.Parameter(expected.clone())
    theirs, ours = moments(kind, count, block), moments(kind, count, block)
    group = SETTINGS
    for number in range(1, 4):
        gradient, step = (torch.randn(count) * torch.rand(count) ** 8).to(dtype), torch.tensor(float(number))
        torch.manual_seed(number)
        single_param_adam(
            expected, gradient, step, theirs["exp_avg"], theirs["exp_avg_sq"], None, group["lr"], *group["betas"],
            group["weight_decay"], group["eps"], True, dtype == torch.bfloat16,
        )  # fmt: skip
        torch.manual_seed(number)
        own.grad = gradient
        with torch.no_grad():
            step_on_host(own, {**ours, "step": step}, group, shared_noise)
        assert own.equal(expected)
        assert all(getattr(ours[n], part).equal(getattr(theirs[n], part)) for n in NAMES for part in ("codes", "scale"))


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made; `known` are the addresses of others."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.found = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.found = max(self.found, leaf.untyped_storage().nbytes())
        return result


def test_a_large_parameter_is_stepped_in_little_memory() -> None:
    count = 8 * _CHUNK
    parameter = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    state = {**moments(OptimState8bit, count, 256), "step": torch.tensor(1.0)}
    kept = [parameter, parameter.grad, *(getattr(state[name], part) for name in NAMES for part in ("codes", "scale"))]
    with torch.no_grad(), Largest({tensor.data_ptr() for tensor in kept}) as largest:
        step_on_host(parameter, state, SETTINGS, own_noise(1))
    assert 0 < largest.found <= 4 * _CHUNK  # a chunk in float32
    assert parameter.any()


def test_noise_is_uniform_and_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    drawn = own_noise(7, 5, 3)(1 << 18)
    assert torch.get_rng_state().equal(before)
    assert drawn.dtype == torch.int32 and drawn.min() >= 0 and drawn.max() < 1 << 16
    for lane in drawn.view(-1, 4).unbind(1):  # parts of one number of 64 bits
        counts = torch.bincount(lane >> 12, minlength=16).float()
        assert (counts / counts.sum() - 1 / 16).abs().max() < 0.003
    again, other = own_noise(7, 5, 3)(1 << 18), own_noise(7, 5, 4)(1 << 18)
    assert again.equal(drawn) and (other == drawn).float().mean() < 1e-3


@pytest.mark.parametrize("noise", [shared_noise, own_noise(0)])
def test_rounding_goes_up_with_the_probability_of_the_rest(noise: Any) -> None:
    """A quarter of the way from 1 to the next bfloat16, 2⁻⁷ above; and the same below zero."""
    torch.manual_seed(0)
    settings = {**SETTINGS, "lr": torch.tensor(0.25 * 2.0**-7), "weight_decay": 0.0, "eps": 0.0}
    for sign in (1.0, -1.0):
        parameter = nn.Parameter(torch.full((1 << 16,), sign, dtype=torch.bfloat16))
        parameter.grad = torch.full_like(parameter, -sign)  # a first step is as long as lr
        state = {name: torch.zeros(1 << 16) for name in NAMES} | {"step": torch.tensor(1.0)}
        with torch.no_grad():
            step_on_host(parameter, state, settings, noise)
        assert set(parameter.unique().tolist()) == {sign, sign * (1 + 2.0**-7)}
        assert (parameter != sign).float().mean().item() == pytest.approx(0.25, abs=0.01)
