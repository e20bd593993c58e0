"""Weights that stay in host memory and visit the device block by block, so that the device need not hold all of them.

Gradients return to the host's parameters. The optimizer and its state stay on the host too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.modules.diffusionmodules.layers import checkpoint


class WeightStream:
    """Runner of blocks with temporary copies of their weights on the device.

    The copies are made for the forward of a block, and again for its backward. While a block computes, the weights of
    the next block are copied, on CUDA on a separate stream. Parameters of another type than the copies are converted
    once per step, to pinned memory. Parameters of the same type are copied from where they are, which is slower and
    takes no memory.

    Args:
        blocks: modules in the order in which they run. A block must not checkpoint its own parts: their recomputation
            would come after the block's weights are freed.
        dtype: type of the copies; the parameters keep theirs.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._blocks = list(blocks)
        self._copies: dict[int, list[Tensor]] = {}  # prefetched copies, by the number of the block
        self._transfer = _Transfer(dtype)
        self._landing = _Landing()
        # What the outputs of `_Copied` depend on, so that a gradient comes back without passing by the parameter.
        self._anchor = torch.empty(0, requires_grad=True)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory that a training on CUDA takes. CUDA's allocator rounds up to powers of two."""
        parameters = [parameter for block in self._blocks for parameter in block.parameters()]
        sizes = [parameter.numel() * self.dtype.itemsize for parameter in parameters]
        kept = sum(
            _power_of_two(size)
            for size, parameter in zip(sizes, parameters, strict=True)
            if parameter.dtype != self.dtype
        )
        return kept + _power_of_two(max(sizes))

    def settle(self) -> None:
        """Drop the prefetched copies and wait for copies in progress.

        Call this before and after a pass through the blocks, since the parameters may change between passes.
        """
        self._copies.clear()
        self._transfer.finish()

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """Return `block(*inputs)`, computed on the device of the first input. Backward recomputes the activations."""
        number, device = self._blocks.index(block), inputs[0].device
        recomputing = False  # true in backward, which starts with the last block

        def compute(*inputs: Tensor | None) -> Tensor:
            nonlocal recomputing
            ahead = number - 1 if recomputing else number + 1
            changed, recomputing = not recomputing, True
            begin = self._transfer.mark(device)
            try:
                return functional_call(block, self._weights(number, device, changed), inputs)
            finally:  # torch ends a recomputation by an exception as soon as backward has all it needs
                self._copy_ahead(ahead, device, changed, begin)

        return checkpoint(compute, *inputs, enabled=True)

    def _weights(self, number: int, device: torch.device, changed: bool) -> dict[str, Tensor]:
        copies = self._copies.pop(number, None)
        if copies is None:
            copies = self._transfer.copy(self._blocks[number], device, changed)
        self._transfer.arrive(copies)
        named = self._blocks[number].named_parameters()
        return {name: self._tied(parameter, copy) for (name, parameter), copy in zip(named, copies, strict=True)}

    def _tied(self, parameter: nn.Parameter, copy: Tensor) -> Tensor:
        """Return `copy`, whose gradient goes to `parameter`."""
        if not parameter.requires_grad:
            return copy
        return _Copied.apply(self._anchor, copy, (parameter, self._landing))

    def _copy_ahead(self, number: int, device: torch.device, changed: bool, begin: torch.cuda.Event | None) -> None:
        if 0 <= number < len(self._blocks) and number not in self._copies:
            self._copies[number] = self._transfer.copy(self._blocks[number], device, changed, begin)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class _Copied(torch.autograd.Function):
    """Function that returns a parameter's copy, and adds the copy's gradient to that of the parameter.

    The parameter itself is no input, so that backward waits until the gradient has arrived and the parameter's hooks
    have run. On CUDA autograd would do both in another thread. Where a hook steps the optimizer, gradients would pile
    up in host memory.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, copy: Tensor, home: tuple[nn.Parameter, _Landing]) -> Tensor:
        ctx.home = home
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        parameter, landing = ctx.home
        arrived = landing.on_host(gradient)
        if parameter.grad is None:
            parameter.grad = arrived.to(parameter.dtype, copy=True)
        else:
            parameter.grad += arrived
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
        return None, None, None


class _Landing:
    """Pinned memory through which gradients come from a CUDA device, one at a time.

    A copy to other memory takes several times longer. The gradient keeps its type, since a conversion on the device
    would double memory and transfer time.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def on_host(self, gradient: Tensor) -> Tensor:
        """Return `gradient` on the host. The next call may overwrite it."""
        if gradient.device.type != "cuda":
            return gradient.cpu()
        if self._memory.nbytes < gradient.nbytes:
            self._memory = torch.empty(gradient.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._memory[: gradient.nbytes].view(gradient.dtype).view(gradient.shape).copy_(gradient)


class _Transfer:
    """Copies of blocks to a device, asynchronous on CUDA."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._pinned: dict[nn.Module, list[Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def copy(
        self, block: nn.Module, device: torch.device, changed: bool, after: torch.cuda.Event | None = None
    ) -> list[Tensor]:
        """Return copies of the block's parameters; `changed` means that they changed since the last copy.

        The copies are made after the event `after`. Before it, copies of earlier blocks may still be in use, and the
        device would hold more than two blocks.
        """
        if device.type != "cuda":
            return [parameter.to(device, self._dtype, copy=True) for parameter in block.parameters()]
        self._stream = self._stream or torch.cuda.Stream(device)
        sources = self._sources(block, changed)
        if after is not None:
            after.synchronize()
        with torch.cuda.stream(self._stream):
            return [source.to(device, non_blocking=True) for source in sources]

    def _sources(self, block: nn.Module, changed: bool) -> list[Tensor]:
        """Return the block's parameters in the dtype of the copies. Converted ones are in pinned memory."""
        others = [parameter for parameter in block.parameters() if parameter.dtype != self._dtype]
        if block not in self._pinned:
            self._pinned[block] = [
                torch.empty(parameter.shape, dtype=self._dtype, pin_memory=True) for parameter in others
            ]
            changed = True
        if changed:
            for pinned, parameter in zip(self._pinned[block], others, strict=True):
                pinned.copy_(parameter)
        converted = iter(self._pinned[block])
        return [
            parameter.detach() if parameter.dtype == self._dtype else next(converted)
            for parameter in block.parameters()
        ]

    def arrive(self, copies: Sequence[Tensor]) -> None:
        """Make the computation wait for `copies`."""
        if self._stream is not None:
            computation = torch.cuda.current_stream(self._stream.device)
            computation.wait_stream(self._stream)
            for copy in copies:
                copy.record_stream(computation)

    def mark(self, device: torch.device) -> torch.cuda.Event | None:
        """Return an event that marks the end of all work given to a CUDA device so far; None on other devices."""
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def finish(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()
