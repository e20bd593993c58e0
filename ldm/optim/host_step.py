"""The step of AdamW with low-bit moments on the host (arXiv:1711.05101, algorithm 2).

A parameter is stepped in chunks, so that the float32 numbers in between take little memory. The arithmetic is that of
torchao's step, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.optim.quantised import Quantised

_CHUNK = 1 << 18  # numbers; about ten float32 tensors of this size exist at a time, and fit a processor's cache

Noise = Callable[[int], Tensor]  # n → n random integers from 0 to 2¹⁶ − 1, int32


def step_on_host(
    parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], noise: Noise | None
) -> None:
    """Step a parameter, given its moments and the settings of its group.

    `noise` rounds bfloat16 weights stochastically; None rounds to nearest.
    """
    weights, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
    first, second = _moment(state["exp_avg"]), _moment(state["exp_avg_sq"])
    lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
    beta1, beta2 = group["betas"]
    correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    chunk = _CHUNK // first.block * first.block or first.block
    for start in range(0, weights.numel(), chunk):
        stop = min(start + chunk, weights.numel())
        w = weights[start:stop].to(torch.float32, copy=True)
        g = gradient[start:stop].float()
        w.sub_(w * (lr * decay))
        m = first.read(start, stop).lerp_(g, 1 - beta1)
        v = second.read(start, stop).lerp_(g.square(), 1 - beta2)
        first.write(start, m)
        second.write(start, v)
        denominator = (v.sqrt() / correction2.sqrt()).add_(eps)
        w.sub_((m / correction1).mul_(lr).div_(denominator))
        _store(w, weights[start:stop], noise)


def own_noise(*words: int) -> Noise:
    """Return a source of random integers that `words`, non-negative integers, name. It leaves torch's own alone."""
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed[0]))

    def noise(count: int) -> Tensor:
        # Four of 16 bits from each number of 64.
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
        return bits.view(torch.int16)[:count].int().add_(1 << 15)

    return noise


def shared_noise(count: int) -> Tensor:
    """Return random integers from torch's global stream, as torchao's rounding takes them."""
    return (1 << 16) - 1 - torch.randint(0, 1 << 16, (count,), dtype=torch.int32)


def _store(w: Tensor, weights: Tensor, noise: Noise | None) -> None:
    """Write float32 numbers to `weights`. Noise below the last bit that bfloat16 keeps rounds stochastically."""
    if noise is None or weights.dtype != torch.bfloat16:
        weights.copy_(w)
    else:
        bits = w.view(torch.int32).add_(noise(w.numel()))
        weights.view(torch.int16).copy_(bits >> 16)


class _Plain:
    """Float32 numbers that are read and written as `Quantised` ones are."""

    block = 1

    def __init__(self, values: Tensor) -> None:
        self.values = values.view(-1)

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].clone()

    def write(self, start: int, values: Tensor) -> None:
        self.values[start : start + values.numel()] = values


def _moment(tensor: Tensor) -> Quantised | _Plain:
    if not hasattr(tensor, "codes"):
        return _Plain(tensor)
    bits = 8 * tensor.codes.numel() // tensor.numel()
    return Quantised(tensor.codes, tensor.scale, tensor.signed, bits)
