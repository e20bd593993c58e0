"""Changes of layers in LyCORIS' formats: LoHa (arXiv:2108.06098), LoKr (arXiv:2212.10650), and whole differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.checkpoint import converted, in_memory
from ldm.util import UserError

# Names of the tensors in files. Those of biases and norms belong to no layer that a LoRA changes here.
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
DIFFERENCE = ("diff",)


@dataclass(frozen=True)
class _Side:
    """Matrix (out, in): `whole`, or A B, or A and B around the core of a convolution.

    Args:
        a, b: (out, r) and (r, in); with a core, (r, out) and (r, in).
        core: (r, r, kh, kw). The matrix is (out, in · kh · kw) then.
    """

    whole: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        return None if self.b is None else self.b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        if self.whole is not None:
            return self.whole.shape[0], self.whole[0].numel()
        if self.core is None:
            return self.a.shape[0], self.b[0].numel()
        return self.a.shape[1], self.b.shape[1] * self.core[0, 0].numel()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape (in, kh, kw) of what one output is computed from; (in · kh · kw,) if it is flat."""
        if self.whole is not None:
            return tuple(self.whole.shape[1:])
        return (self.b.shape[1], *self.core.shape[2:]) if self.core is not None else tuple(self.b.shape[1:])

    @property
    def fits(self) -> bool:
        """True if the tensors fit each other."""
        if self.whole is not None:
            return self.whole.ndim >= 2 and self.whole.numel() > 0
        if self.a is None or self.b is None or min(self.a.ndim, self.b.ndim) != 2 or not self.b.shape[0]:
            return False
        if self.core is None:
            return self.a.ndim == 2 and self.a.shape[1] == self.b.shape[0]
        ranks = self.a.shape[0], self.b.shape[0]
        return self.core.ndim == 4 and tuple(self.core.shape[:2]) == ranks and self.a.ndim == self.b.ndim

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        def read(tensor: Tensor) -> Tensor:
            return converted(in_memory(tensor), dtype).to(device)

        if self.whole is not None:
            return read(self.whole).flatten(1)
        if self.core is None:
            return read(self.a) @ read(self.b).flatten(1)
        return torch.einsum("abhw,ao,bi->oihw", read(self.core), read(self.a), read(self.b)).flatten(1)


@dataclass(frozen=True)
class LycorisChange:
    """Change of one layer.

    Args:
        first, second: sides of the product; a whole difference has no second one.
        is_kronecker: the product is that of Kronecker, else that of Hadamard.
        scale: factor of the product.
        magnitude: m of DoRA, (out, 1) or (1, in).
    """

    first: _Side
    second: _Side | None
    is_kronecker: bool
    scale: float
    magnitude: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the change as a matrix (out, in · kh · kw)."""
        rows, columns = self.first.shape
        if not self.is_kronecker or self.second is None:
            return rows, columns
        return rows * self.second.shape[0], columns * self.second.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Shape (in, kh, kw) of what the change of one output is computed from; (in · kh · kw,) if it is flat."""
        if self.second is None:
            return self.first.kernel
        first, second = self.first.kernel, self.second.kernel
        if self.is_kronecker:
            return math.prod(first) * second[0], *second[1:]
        return max(first, second, key=len)

    def change(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ΔW as a matrix (out, in · kh · kw)."""
        first = self.first.matrix(dtype, device)
        if self.second is None:
            return self.scale * first
        second = self.second.matrix(dtype, device)
        return self.scale * (torch.kron(first, second) if self.is_kronecker else first * second)


def is_lycoris(names: Mapping[str, Tensor]) -> bool:
    """Return True if the tensors `names` of a layer are of a format of this module."""
    return any(name in names for name in (*HADAMARD, *KRONECKER, *DIFFERENCE))


def lycoris_change(
    tensors: Mapping[str, Tensor], alpha: float | None, magnitude: Tensor | None, where: str
) -> LycorisChange:
    """Return the change that the `tensors` of a layer describe. `where` names the layer in messages.

    Raises:
        UserError: a tensor is missing, or has a shape that does not fit.
    """
    if "diff" in tensors:
        change = LycorisChange(_Side(tensors["diff"]), None, False, 1.0, magnitude)
        sides = [change.first]
    else:
        is_kronecker = any(name in tensors for name in KRONECKER)
        start = "lokr_" if is_kronecker else "hada_"
        sides = [
            _Side(*(tensors.get(f"{start}{name}") for name in (f"w{n}", f"w{n}_a", f"w{n}_b", f"t{n}"))) for n in (1, 2)
        ]
        rank = sides[0].rank or sides[1].rank
        scale = 1.0 if alpha is None or rank is None else alpha / rank  # without a rank, α has no meaning
        change = LycorisChange(*sides, is_kronecker, scale, magnitude)
    fits = all(side.fits for side in sides)
    if not fits or (len(sides) == 2 and not change.is_kronecker and sides[0].shape != sides[1].shape):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise UserError(f"{where}: lacks a tensor, or has some that do not fit ({shapes}); download the file again")
    return change
