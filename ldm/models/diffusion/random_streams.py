"""Random numbers of a batch, independent of the distribution of samples over processes and batches.

B: batch. C, h, w: channels, height and width of a latent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.diffusion.batch import Batch
from ldm.shards.sample import QUANTILE, STREAM


@dataclass(frozen=True)
class RandomStreams:
    """Random numbers for the rows of a batch. Each row has a name, and each name has its own streams.

    Without `names`, the numbers of the whole batch come from the global generators. Numbers are sampled on the device
    of the result, and differ between GPU and CPU. In validation, `quantiles` (B,) are the places of the timesteps.
    """

    names: Sequence[str] | None = None
    quantiles: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> RandomStreams:
        """Return the random streams of a batch. Its entry `STREAM` names the rows."""
        return cls(batch.get(STREAM), batch.get(QUANTILE))

    def held_out_timesteps(self, count: int, like: Tensor) -> Tensor:
        """Return timesteps (B,) below `count` for validation: those at `quantiles`, or else uniform ones."""
        if self.quantiles is None:
            return self.integers("timestep", count, like)
        return (self.quantiles.to(like.device, torch.float32) * count).long().clamp(max=count - 1)

    def normal(self, what: str, like: Tensor) -> Tensor:
        """Return standard normal numbers from the stream `what`, with shape (B, ...), dtype and device of `like`."""
        if self.names is None:
            return torch.randn_like(like)
        kind = {"device": like.device, "dtype": like.dtype}
        return self._rows(what, like, lambda generator: torch.randn(like.shape[1:], generator=generator, **kind))

    def integers(self, what: str, high: int, like: Tensor) -> Tensor:
        """Return uniform integers (B,) below `high`, on the device of `like` (B, ...), from the stream `what`."""
        if self.names is None:
            return torch.randint(0, high, (len(like),), device=like.device)
        return self._rows(
            what, like, lambda generator: torch.randint(0, high, (), generator=generator, device=like.device)
        )

    def uniform(self, what: str, like: Tensor) -> Tensor:
        """Return uniform numbers (B,) from 0 to 1, on the device of `like` (B, ...), from the stream `what`."""
        if self.names is None:
            return torch.rand(len(like), device=like.device)
        return self._rows(what, like, lambda generator: torch.rand((), generator=generator, device=like.device))

    def _rows(self, what: str, like: Tensor, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
        generator = torch.Generator(like.device)
        rows = []
        for name in self.names:
            digest = hashlib.blake2b(f"{name}/{what}".encode(), digest_size=8).digest()
            rows.append(sample(generator.manual_seed(int.from_bytes(digest, "little") >> 1)))  # a seed has 63 bits
        return torch.stack(rows)


GLOBAL_STREAM = RandomStreams()
