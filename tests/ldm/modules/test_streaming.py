"""Tests of the copies of weights that exist at each moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.streaming import WeightStream


class Noting(nn.Linear):
    """A linear layer that notes, when it computes, how many copies are ready ahead, and in `order` its own number."""

    def __init__(self, number: int, seen: list[tuple[int, list[int]]]) -> None:
        super().__init__(4, 4)
        self.number, self.seen = number, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.number, sorted(self.stream._copies)))
        return super().forward(x)


def chain(blocks: int) -> tuple[WeightStream, list[Noting], list[tuple[int, list[int]]]]:
    seen: list[tuple[int, list[int]]] = []
    layers = [Noting(number, seen) for number in range(blocks)]
    stream = WeightStream(layers, torch.float32)
    for layer in layers:
        object.__setattr__(layer, "stream", stream)
    return stream, layers, seen


def forward(stream: WeightStream, layers: list[Noting]) -> Tensor:
    stream.settle()
    x = torch.ones(1, 4)
    for layer in layers:
        x = stream.run(layer, x).tanh()
    stream.settle()
    return x


def test_one_block_is_copied_ahead_in_the_order_of_use() -> None:
    stream, layers, seen = chain(3)
    copied: list[int] = []
    copy = stream._transfer.copy
    stream._transfer.copy = lambda block, *how: copied.append(block.number) or copy(block, *how)
    out = forward(stream, layers)
    assert copied == [0, 1, 2] and [number for number, _ in seen] == [0, 1, 2]
    out.sum().backward()
    assert copied == [0, 1, 2, 2, 1, 0] and [number for number, _ in seen] == [0, 1, 2, 2, 1, 0]
    assert all(ahead == [] for _, ahead in seen)  # its own was taken, the next one comes after
    assert stream._copies == {}


def test_copies_go_with_the_pass_that_made_them() -> None:
    stream, layers, _ = chain(3)
    forward(stream, layers)  # whose backward never comes
    stream.run(layers[0], torch.ones(1, 4))
    assert list(stream._copies) == [1]
    stream.settle()
    assert stream._copies == {}


def test_a_frozen_block_passes_gradients_on() -> None:
    stream, layers, _ = chain(3)
    layers[1].requires_grad_(False)
    forward(stream, layers).sum().backward()
    assert layers[1].weight.grad is None
    assert layers[0].weight.grad is not None and layers[2].weight.grad is not None


def test_without_gradients_nothing_is_recomputed() -> None:
    stream, layers, seen = chain(2)
    with torch.no_grad():
        forward(stream, layers)
    assert [number for number, _ in seen] == [0, 1]


def test_the_next_copy_comes_after_what_was_before_this_block() -> None:
    stream, layers, seen = chain(3)
    copied: list[tuple[int, Any]] = []
    transfer = stream._transfer
    copy = transfer.copy

    def noted(block: Noting, device: torch.device, changed: bool, after: Any = None) -> list[Tensor]:
        copied.append((block.number, after))
        return copy(block, device, changed)

    transfer.mark, transfer.copy = lambda device: f"blocks before {len(seen)}", noted
    forward(stream, layers)
    assert copied == [(0, None), (1, "blocks before 0"), (2, "blocks before 1")]
