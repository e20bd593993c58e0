"""Weights that stay in host memory and visit the device one block at a time, so that the device need not hold them.

The gradients come back to the host's parameters, and there are the optimizer and all that it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.modules.diffusionmodules.util import checkpoint


class WeightStream:
    """Runs blocks with copies of their weights, made for the forward of a block and again for its backward.

    While a block computes, the weights of the next one are copied: on CUDA from pinned memory on a stream of their own.

    Args:
        blocks: modules in the order in which they run; none may checkpoint its own parts, since a part would be
            recomputed when the block's weights have gone.
        dtype: of the copies; the parameters keep theirs.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._blocks = list(blocks)
        self._copies: dict[int, list[Tensor]] = {}  # made ahead, by the number of the block
        self._transfer = _Transfer(dtype)

    def settle(self) -> None:
        """Drop what was copied ahead and wait for copies under way. To be called before and after a pass through the
        blocks: the parameters may change between."""
        self._copies.clear()
        self._transfer.finish()

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """`block(*inputs)` on the device of the first input; activations within are recomputed in backward."""
        number, device = self._blocks.index(block), inputs[0].device
        recomputing = False  # which happens in backward, the last block first

        def compute(*inputs: Tensor | None) -> Tensor:
            nonlocal recomputing
            ahead = number - 1 if recomputing else number + 1
            changed, recomputing = not recomputing, True
            begin = self._transfer.mark(device)
            try:
                return functional_call(block, self._weights(number, device, changed), inputs)
            finally:  # a recomputation is left by an exception once it has made what backward needs
                self._copy_ahead(ahead, device, changed, begin)

        return checkpoint(compute, *inputs, enabled=True)

    def _weights(self, number: int, device: torch.device, changed: bool) -> dict[str, Tensor]:
        copies = self._copies.pop(number, None)
        if copies is None:
            copies = self._transfer.copy(self._blocks[number], device, changed)
        self._transfer.arrive(copies)
        named = self._blocks[number].named_parameters()
        return {name: _Copied.apply(parameter, copy) for (name, parameter), copy in zip(named, copies, strict=True)}

    def _copy_ahead(self, number: int, device: torch.device, changed: bool, begin: torch.cuda.Event | None) -> None:
        if 0 <= number < len(self._blocks) and number not in self._copies:
            self._copies[number] = self._transfer.copy(self._blocks[number], device, changed, begin)


class _Copied(torch.autograd.Function):
    """A parameter's copy in the parameter's place: what is its gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.home = {"device": parameter.device, "dtype": parameter.dtype}
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if gradient.device.type == "cuda":
            # In its own type and into pinned memory: converted there, it would take twice the memory, the bus twice the
            # time, and an unpinned copy several times that.
            gradient = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True).copy_(gradient)
        return gradient.to(**ctx.home, copy=True), None


class _Transfer:
    """Copies to a device. On the CPU they are plain ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._pinned: dict[nn.Module, list[Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def copy(
        self, block: nn.Module, device: torch.device, changed: bool, after: torch.cuda.Event | None = None
    ) -> list[Tensor]:
        """Copies of the block's parameters; `changed`: since the last time.

        They are made when `after` has come to pass: until then copies for earlier blocks may be in use, and with these
        there would be more than two.
        """
        if device.type != "cuda":
            return [parameter.to(device, self._dtype, copy=True) for parameter in block.parameters()]
        self._stream = self._stream or torch.cuda.Stream(device)
        pinned = self._pin(block, changed)
        if after is not None:
            after.synchronize()
        with torch.cuda.stream(self._stream):
            return [source.to(device, non_blocking=True) for source in pinned]

    def _pin(self, block: nn.Module, changed: bool) -> list[Tensor]:
        """The parameters in pinned memory and in the type of the copies, so that half as much crosses the bus."""
        if block not in self._pinned:
            self._pinned[block] = [
                torch.empty(parameter.shape, dtype=self._dtype, pin_memory=True) for parameter in block.parameters()
            ]
            changed = True
        if changed:
            for pinned, parameter in zip(self._pinned[block], block.parameters(), strict=True):
                pinned.copy_(parameter)
        return self._pinned[block]

    def arrive(self, copies: Sequence[Tensor]) -> None:
        """Let the computation wait for `copies`."""
        if self._stream is not None:
            computation = torch.cuda.current_stream(self._stream.device)
            computation.wait_stream(self._stream)
            for copy in copies:
                copy.record_stream(computation)

    def mark(self, device: torch.device) -> torch.cuda.Event | None:
        """What tells when a CUDA device has done all that it was given so far."""
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def finish(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()
