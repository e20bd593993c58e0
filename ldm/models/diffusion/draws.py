"""Random numbers of a batch. They do not depend on how a step's samples are spread over processes and batches.

B batch; C, h, w channels, height and width of a latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.diffusion.batch import Batch
from ldm.shards.sample import DRAW


@dataclass(frozen=True)
class Draws:
    """Random numbers for the rows of a batch. A named row has streams of its own.

    Without `names`, as in validation, the global generators give the numbers of the whole batch. Numbers are sampled
    on the device that needs them, so a GPU's differ from the CPU's.
    """

    names: Sequence[str] | None = None

    @classmethod
    def of(cls, batch: Batch) -> Draws:
        """Return the random numbers of a batch, whose entry `DRAW` names its rows."""
        return cls(batch.get(DRAW))

    def normal(self, what: str, like: Tensor) -> Tensor:
        """Return standard normal numbers for `what`, of the shape (B, ...), dtype and device of `like`."""
        if self.names is None:
            return torch.randn_like(like)
        kind = {"device": like.device, "dtype": like.dtype}
        return self._rows(what, like, lambda generator: torch.randn(like.shape[1:], generator=generator, **kind))

    def integers(self, what: str, high: int, like: Tensor) -> Tensor:
        """Return uniform integers (B,) for `what`, from 0 to `high` - 1, on the device of `like` (B, ...)."""
        if self.names is None:
            return torch.randint(0, high, (len(like),), device=like.device)
        return self._rows(
            what, like, lambda generator: torch.randint(0, high, (), generator=generator, device=like.device)
        )

    def uniform(self, what: str, like: Tensor) -> Tensor:
        """Return uniform numbers (B,) for `what`, from 0 to 1, on the device of `like` (B, ...)."""
        if self.names is None:
            return torch.rand(len(like), device=like.device)
        return self._rows(what, like, lambda generator: torch.rand((), generator=generator, device=like.device))

    def _rows(self, what: str, like: Tensor, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        generator = torch.Generator(like.device)
        rows = []
        for name in self.names:
            digest = hashlib.blake2b(f"{name}/{what}".encode(), digest_size=8).digest()
            rows.append(draw(generator.manual_seed(int.from_bytes(digest, "little") >> 1)))  # torch's seeds have signs
        return torch.stack(rows)


FROM_GLOBAL = Draws()
