"""Values for the fuzzer: when two are equal, and how a part of one is struck."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoint.formats import as_bytes


def comparable(value: Any) -> Any:
    """Return a form of `value` in which equal contents compare equal: NaN equals itself, and types count."""
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), as_bytes(value).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return "array", value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {repr(key): comparable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return "list" if isinstance(value, list) else "tuple", [comparable(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(map(repr, value))
    return type(value).__name__, repr(value)


def write_file(folder: Path, name: str, data: bytes) -> Path:
    """Write a file in `folder`, and return its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def strike(rng: random.Random, value: Any, strange: Sequence[Any]) -> Any:
    """Return `value` with one part left out, replaced by one of the `strange` values, or struck itself."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(strange)
    changed = dict(value) if isinstance(value, dict) else list(value)
    place = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.3:
        del changed[place]
    else:
        changed[place] = strike(rng, value[place], strange)
    return changed
