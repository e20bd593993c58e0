"""Digests of weights, equal whichever file they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoint.keys import COND_STAGE, CONDITIONER, FIRST_STAGE, TOWERS, has_part, is_optional
from ldm.checkpoint.mapped import in_memory

_DIGESTED = (
    *(torch.float16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def encoder_digests(weights: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Return the digests of a model's autoencoder and of each text tower, named as in the index of a set."""
    prefixes = {"autoencoder": FIRST_STAGE, "text_tower": COND_STAGE}
    if has_part(weights, CONDITIONER):
        prefixes |= dict(zip(("text_tower", "text_tower_2"), TOWERS, strict=True))
    return {name: weights_digest(weights, prefix) for name, prefix in prefixes.items()}


def weights_digest(weights: Mapping[str, Tensor], prefix: str = "") -> str | None:
    """Return the SHA-256, in hex, of the `weights` whose keys begin with `prefix`; None if there are none.

    The digest covers, in the order of the keys without the prefix: key, shape, and values, little-endian and in row
    order, floating-point ones rounded to float16. So a float32 release and its float16 copy have one digest, in any
    kind of file. Optional keys (`position_ids`, a training loss) are left out, also where the key with the prefix is
    one. Weights in a dtype that lost bits which float16 keeps, such as bfloat16, have none.
    """
    found = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
    hashed = hashlib.sha256()
    kept = [name for name in sorted(found) if not (is_optional(name) or is_optional(found[name]))]
    for name in kept:
        value = in_memory(weights[found[name]]).detach().cpu()
        if value.dtype not in _DIGESTED:
            return None
        value = value.to(torch.float16 if value.is_floating_point() else torch.int64).contiguous().numpy()
        hashed.update(f"{name} {value.shape}\n".encode())
        hashed.update(value.astype(value.dtype.newbyteorder("<"), copy=False).data)
    return hashed.hexdigest() if kept else None
