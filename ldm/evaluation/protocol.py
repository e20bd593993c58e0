"""What is the same in every evaluation: the timesteps, the noise, and which samples of a set are looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.util import UserError


def midpoint_timesteps(num_timesteps: int, count: int) -> list[int]:
    """The midpoints of `count` equal strata of 0 … `num_timesteps` − 1, rising.

    Raises:
        UserError: there are not that many timesteps.
    """
    if not 1 <= count <= num_timesteps:
        raise UserError(f"{count} timesteps to evaluate at: choose 1 to {num_timesteps}, the model's")
    return [(2 * stratum + 1) * num_timesteps // (2 * count) for stratum in range(count)]


def fixed_noise(key: str, t: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of `shape`, float32 on the CPU: a function of the sample's `key` and the timestep alone."""
    digest = hashlib.sha256(f"{t}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def spread(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of the numbers 0 … `count` − 1, evenly spread: what stands in order is not cut at its middle."""
    kept = count if limit is None else min(limit, count)
    return np.arange(kept) * count // max(kept, 1)
