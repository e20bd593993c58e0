"""Fixed parts of every evaluation: the timesteps, the noise, and the choice of samples from a set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.util import refuse_if


def midpoint_timesteps(num_timesteps: int, count: int) -> list[int]:
    """Return the midpoints of `count` equal strata of 0 … `num_timesteps` − 1, in rising order.

    Raises:
        UserError: `count` is below 1 or above `num_timesteps`.
    """
    refuse_if(
        not 1 <= count <= num_timesteps,
        f"{count} timesteps for the evaluation: choose 1 to {num_timesteps}, the model's number",
    )
    return [(2 * stratum + 1) * num_timesteps // (2 * count) for stratum in range(count)]


def fixed_noise(key: str, t: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise of `shape`, float32 on the CPU, that depends on the sample's `key` and `t` alone."""
    digest = hashlib.sha256(f"{t}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def spread(count: int, limit: int | None) -> np.ndarray:
    """Return at most `limit` of the numbers 0 … `count` − 1, at even distances; None returns all of them.

    A limited set thus covers the whole of an ordered set, and not only its beginning.
    """
    kept = count if limit is None else min(limit, count)
    return np.arange(kept) * count // max(kept, 1)
