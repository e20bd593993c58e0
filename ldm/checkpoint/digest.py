"""What tells weights apart, whichever file they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoint.loading import is_optional


def encoder_digests(weights: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Digests of a model's autoencoder and text tower, under the names that the index of a set has for them."""
    prefixes = {"autoencoder": "first_stage_model.", "text_tower": "cond_stage_model."}
    return {name: weights_digest(weights, prefix) for name, prefix in prefixes.items()}


def weights_digest(weights: Mapping[str, Tensor], prefix: str = "") -> str | None:
    """The SHA-256, in hex, of the `weights` whose keys begin with `prefix`; None if there are none.

    Hashed are, in the order of the keys without the prefix: key, shape, and values, little-endian and in row order,
    floating-point ones rounded to float16. So a float32 release and its float16 copy have one digest, in whatever kind
    of file. What a file may carry or lack (`position_ids`, a training loss) does not count. bfloat16 has lost bits that
    float16 keeps: None as well.
    """
    found = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
    hashed = hashlib.sha256()
    kept = [name for name in sorted(found) if not is_optional(name)]
    for name in kept:
        value = weights[found[name]].detach().cpu()
        if value.dtype == torch.bfloat16:
            return None
        value = value.to(torch.float16 if value.is_floating_point() else torch.int64).contiguous().numpy()
        hashed.update(f"{name} {value.shape}\n".encode())
        hashed.update(value.astype(value.dtype.newbyteorder("<"), copy=False).data)
    return hashed.hexdigest() if kept else None
