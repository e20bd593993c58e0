"""Numbers that torchao keeps in 8 or 4 bits: from codes to values and back, on the host.

A block of numbers has one scale, its largest magnitude. A code is the position of the nearest value in a fixed table
(8 bits: arXiv:2110.02861; 4 bits: arXiv:2309.01507). Codes equal torchao's in every bit. torchao searches the table in
one pass over the numbers for each bit. Here the upper half of a float32 names the code, or the lower of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.util import UserError

try:
    from torchao import optim as torchao
    from torchao.optim import subclass_4bit, subclass_8bit
except ModuleNotFoundError as error:
    raise UserError(
        "the low-bit optimizers and their states need torchao, which is not installed: "
        "pip install -c constraints.txt '.[lean]'"
    ) from error

__all__ = ["Quantised", "dequantised", "torchao"]

_LEAST_SCALE = 1e-12
_HALVES = 1 << 16  # upper halves of a float32
_MODULES = {4: subclass_4bit, 8: subclass_8bit}


class Quantised:
    """Blocks of quantised numbers, flat, which are read and written a part at a time.

    Args:
        codes: uint8; two to a byte with 4 bits, the first in the upper half.
        scale: float32, one per block.
        signed: whether the numbers may be negative.
        bits: 4 or 8.
    """

    def __init__(self, codes: Tensor, scale: Tensor, signed: bool, bits: int) -> None:
        self.codes, self.scale, self.bits = codes.view(-1), scale, bits
        self.block = self.codes.numel() * (8 // bits) // scale.numel()
        self._values, self._lower, self._thresholds = _tables(bits, signed)

    def read(self, start: int, stop: int) -> Tensor:
        """Return numbers `start` to `stop`, multiples of the block, as a new float32 tensor."""
        if self.bits == 4:
            pairs = self.codes[start // 2 : stop // 2]
            codes = torch.stack([pairs >> 4, pairs & 0b1111], dim=-1).view(-1)
        else:
            codes = self.codes[start:stop]
        values = self._values.index_select(0, codes.int()).view(-1, self.block)
        return values.mul_(self._scales(start, stop)[:, None]).view(-1)

    def write(self, start: int, values: Tensor) -> None:
        """Quantise `values`, float32, to the numbers from `start` on."""
        blocks = values.view(-1, self.block)
        scales = self._scales(start, start + values.numel())
        scales.copy_(blocks.abs().amax(-1).clip_(_LEAST_SCALE))
        scaled = (blocks / scales[:, None]).view(-1)
        half = (scaled.view(torch.int32) >> 16).add_(_HALVES // 2)
        codes = self._lower.index_select(0, half)
        codes += scaled >= self._thresholds.index_select(0, half)
        if self.bits == 4:
            self.codes[start // 2 : start // 2 + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
        else:
            self.codes[start : start + codes.numel()] = codes

    def _scales(self, start: int, stop: int) -> Tensor:
        return self.scale[start // self.block : stop // self.block]


def dequantised(saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
    """Return, in float32, what a checkpoint holds of a quantised tensor of this `shape`: codes, scale and signed.

    Raises:
        ValueError: it holds a tensor of another size.
    """
    codes, scale, count = saved["codes"], saved["scale"], shape.numel()
    bits = next((bits for bits in _MODULES if codes.numel() * 8 == count * bits), None)
    if bits is None or not scale.numel() or count % scale.numel():
        raise ValueError(
            f"loaded state dict has {codes.numel()} codes and {scale.numel()} scales for a parameter of shape "
            f"{tuple(shape)}"
        )
    return Quantised(codes, scale, saved["signed"], bits).read(0, count).view(shape)


@cache
def _tables(bits: int, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tables: values by code; and, by upper half, lower codes and thresholds.

    The upper half of a number is its upper 16 bits, counted from −2¹⁵. Numbers with the same upper half have one of two
    codes. The second table holds the lower of these, and the third the least number that has the higher one. A number
    between two values has the higher code if its distance to the lower value, rounded to float32, is at least half of
    the distance of the values.
    """
    module = _MODULES[bits]
    values = np.array(module.get_qmap_signed() if signed else module.get_qmap_unsigned(), np.float32)
    least = _least_rounded_up(values[:-1], values[1:])
    halves = np.arange(-_HALVES // 2, _HALVES // 2, dtype=np.int64)
    smallest = _float((halves << 16) + np.where(halves < 0, 0xFFFF, 0))  # number with that upper half
    lower = np.where(np.isnan(smallest), 0, np.searchsorted(least, smallest, side="right"))
    thresholds = np.append(least, np.float32(np.inf))[lower]
    return torch.from_numpy(values), torch.from_numpy(lower.astype(np.uint8)), torch.from_numpy(thresholds)


def _least_rounded_up(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Return the least float32 between each `lower` and `upper` value that is rounded up, by bisection."""
    no, yes = _order(lower), _order(upper)
    half = (upper - lower) * np.float32(0.5)
    while (yes - no > 1).any():
        middle = (no + yes) // 2
        up = _float(_order_bits(middle)) - lower >= half
        no, yes = np.where(up, no, middle), np.where(up, middle, yes)
    return _float(_order_bits(yes))


def _float(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.int32).view(np.float32)


def _order(values: np.ndarray) -> np.ndarray:
    """Return integers in the order of float32 `values`, one apart for neighbours."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _order_bits(order: np.ndarray) -> np.ndarray:
    """Return the bits of the float32 values with this `order`, as signed integers."""
    return np.where(order < 0, -order - (1 << 31), order)
