"""Digests of weights, independent of the file format and of float16 or float32."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoint.diffusers_keys import OPEN_CLIP, RESBLOCKS_OF_SD2, resblocks
from ldm.checkpoint.keys import COND_STAGE, CONDITIONER, ENCODER, FIRST_STAGE, TOWERS, has_part, is_optional
from ldm.checkpoint.mapped import in_memory

USED_TOWER, USED_AUTOENCODER = "text_tower_used", "autoencoder_used"
_DIGESTED = (
    *(torch.float16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def encoder_digests(weights: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Return the digests of a model's autoencoder and text towers, under their keys in an index.

    `USED_AUTOENCODER` is the digest of the autoencoder's encoder, which alone makes samples. For SD 2, `USED_TOWER` is
    the digest of the text tower without its last block, which is not used, and which folders of diffusers lack.
    """
    prefixes = {"autoencoder": FIRST_STAGE, "text_tower": COND_STAGE}
    if has_part(weights, CONDITIONER):
        prefixes |= dict(zip(("text_tower", "text_tower_2"), TOWERS, strict=True))
    digests = {name: weights_digest(weights, prefix) for name, prefix in prefixes.items()}
    encoder = tuple(FIRST_STAGE + name for name in ENCODER)
    if used := {key: value for key, value in weights.items() if key.startswith(encoder)}:
        digests[USED_AUTOENCODER] = weights_digest(used, FIRST_STAGE)
    blocks = resblocks([key.removeprefix(COND_STAGE + OPEN_CLIP) for key in weights if key.startswith(COND_STAGE)])
    if blocks:
        last = f"{RESBLOCKS_OF_SD2}{blocks - 1}."
        digests[USED_TOWER] = weights_digest({k: v for k, v in weights.items() if not k.startswith(last)}, COND_STAGE)
    return digests


def weights_digest(weights: Mapping[str, Tensor], prefix: str = "") -> str | None:
    """Return the SHA-256, in hex, of the `weights` with keys below `prefix`, or None if there are none.

    The digest covers key without prefix, shape and values, sorted by key. Values are little-endian and in row order.
    Floating-point values are rounded to float16. A float32 release and its float16 copy therefore have the same digest.
    Keys that are optional with or without the prefix (`position_ids`, a training loss) are skipped. The result is also
    None for dtypes with less precision than float16, such as bfloat16.
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
