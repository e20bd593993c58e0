"""The sample format: members of a sample, their types, and the batch entries that the data give and the models read.

A sample `<key>` of a shard is `<key>.f8.npy`, `<key>.t5.npy`, `<key>.txt` and `<key>.json`; a teacher adds its members.
An output of a second text encoder becomes part of the format by its name in `TEXT_ENCODINGS`: pre-encoding stores it
beside the first one where the cond stage gives a mapping with it, and `null.<name>.npy` of the empty caption.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.shards import npy

LATENT = "f8"  # a posterior's mean and log variance (2C, h, w), or a latent (C, h, w); unscaled
CONTEXT = "t5"  # the text encoder's hidden states (77, D)
TEXT_ENCODINGS = (CONTEXT,)  # members that are outputs of text encoders
STORED = np.float16  # the type of stored latents and encodings

STREAM = "stream"  # B strings: each names the random numbers which a training step draws for its sample
IS_PRIOR = "is_prior"  # bool (B,): samples that are there to be remembered
# Questions and answers of a frozen model about a prior's sample: a timestep, an integer from 0, (B,); the noise
# (B, C, h, w); and the output (B, C, h, w), whatever it predicts. A stored sample has K of each.
TIMESTEPS, NOISE, PREDICTION = TEACHER_KEYS = ("t", "noise", "prediction")

TEXT_KEYS = ("txt", "json")  # members that are not arrays
CAPTION, ORIGIN = TEXT_KEYS

# Posteriors are read with log variances in this range. Unclamped ones need not fit in float16.
LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


def member_extension(key: str) -> str:
    """Return the end of the member's name that holds `key`: `f8` is in `<sample>.f8.npy`, `txt` in `<sample>.txt`."""
    return key if key in TEXT_KEYS else f"{key}.npy"


def number_types(key: str) -> tuple[str, ...]:
    """Return the numpy types that the array under `key` may have."""
    return npy.INTEGERS if key == TIMESTEPS else npy.FLOATS


def null_path(folder: Path, key: str = CONTEXT) -> Path:
    """Return the file beside the shards in `folder` with the encoding `key` of the empty caption."""
    return folder / f"null.{member_extension(key)}"


def text_encodings(conditioning: Any) -> dict[str, Any]:
    """Return what a cond stage gives, by member: one value is the context, a mapping has a value for each member."""
    if not isinstance(conditioning, Mapping):
        return {CONTEXT: conditioning}
    assert set(conditioning) <= set(TEXT_ENCODINGS), f"{set(conditioning)} of the cond stage are not in the format"
    return dict(conditioning)


def encode_members(
    latent: np.ndarray,
    encodings: Mapping[str, np.ndarray],
    caption: str,
    origin: Mapping[str, Any],
    others: Mapping[str, np.ndarray] | None = None,
) -> dict[str, bytes]:
    """Return the members of a sample, by extension, in the order in which they are written.

    Args:
        origin: where the sample comes from, for its `json`.
        others: further arrays by key, such as the teacher's.
    """
    arrays = {LATENT: latent, **encodings}
    members = {member_extension(key): npy.encode(array) for key, array in arrays.items()}
    members |= {CAPTION: caption.encode(), ORIGIN: json.dumps(origin).encode()}
    return members | {member_extension(key): npy.encode(array) for key, array in (others or {}).items()}


def index_shapes(latents: Iterable[Iterable[int]], encodings: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what an index says of the shapes: all those of latents, and that of each encoding."""
    return {LATENT: [list(shape) for shape in latents], **{key: list(value.shape) for key, value in encodings.items()}}
