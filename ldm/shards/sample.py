"""Sample format: members of a sample, their types, and the batch entries of the same names.

A sample `<key>` of a shard has the members `<key>.f8.npy`, `<key>.t5.npy`, `<key>.txt` and `<key>.json`. A teacher adds
members. To store an output of a second text encoder, add its name to `TEXT_ENCODINGS`. Pre-encoding then stores it if
the cond stage returns a mapping with this name, and stores the encoding of the empty caption in `null.<name>.npy`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.shards import npy

LATENT = "f8"  # mean and log-variance of a posterior (2C, h, w), or a latent (C, h, w), unscaled
CONTEXT = "t5"  # hidden states of the text encoder (77, D)
TEXT_ENCODINGS = (CONTEXT,)  # members with outputs of text encoders
STORED = np.float16  # dtype of stored latents and encodings

STREAM = "stream"  # B strings: names of the random streams of the samples
IS_PRIOR = "is_prior"  # bool (B,): True for prior samples
# Predictions of a frozen model on prior samples: the timestep (B,), counted from 0; the noise (B, C, h, w); and the
# model's output (B, C, h, w). A stored sample has K of each.
TIMESTEPS, NOISE, PREDICTION = TEACHER_KEYS = ("t", "noise", "prediction")

TEXT_KEYS = ("txt", "json")  # members that are not arrays
CAPTION, ORIGIN = TEXT_KEYS

# Log-variances of posteriors are clamped to this range. Other values may not fit in float16.
LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


def member_extension(key: str) -> str:
    """Return the extension of the member `key`, such as `f8.npy` for `f8` and `txt` for `txt`."""
    return key if key in TEXT_KEYS else f"{key}.npy"


def number_types(key: str) -> tuple[str, ...]:
    """Return the valid numpy types of the array `key`."""
    return npy.INTEGERS if key == TIMESTEPS else npy.FLOATS


def null_path(folder: Path, key: str = CONTEXT) -> Path:
    """Return the path of the encoding `key` of the empty caption, for the shards in `folder`."""
    return folder / f"null.{member_extension(key)}"


def text_encodings(conditioning: Any) -> dict[str, Any]:
    """Return the output of a cond stage by member. A single value is the context; a mapping has several members."""
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
    """Return the members of a sample by extension, in the order of the file.

    Args:
        origin: content of the member `json`, the origin of the sample.
        others: further arrays by key, such as those of a teacher.
    """
    arrays = {LATENT: latent, **encodings}
    members = {member_extension(key): npy.encode(array) for key, array in arrays.items()}
    members |= {CAPTION: caption.encode(), ORIGIN: json.dumps(origin).encode()}
    return members | {member_extension(key): npy.encode(array) for key, array in (others or {}).items()}


def index_shapes(latents: Iterable[Iterable[int]], encodings: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the entries of an index for shapes: all shapes of latents, and the shape of each encoding."""
    return {LATENT: [list(shape) for shape in latents], **{key: list(value.shape) for key, value in encodings.items()}}
