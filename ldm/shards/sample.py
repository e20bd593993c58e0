"""The sample format: members of a sample, their types, and the batch entries that the data give and the models read.

A sample `<key>` of a shard is `<key>.f8.npy`, `<key>.t5.npy`, `<key>.txt` and `<key>.json`. Families of models add
members: SDXL `pooled.npy`, and sizes in the `json`; inpainting `mask.npy` and `masked_image.npy`, once for each mask;
InstructPix2Pix `edit.npy`. A teacher adds its own. Beside the shards, `null.<name>.npy` is what stands for the empty
caption, and for the masked image of which nothing is seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.shards import npy

LATENT = "f8"  # a posterior's mean and log variance (2C, h, w), or a latent (C, h, w); unscaled
CONTEXT = "t5"  # the text encoder's hidden states (77, D)
POOLED = "pooled"  # the pooled state of a second text encoder (E,)
TEXT_ENCODINGS = (CONTEXT, POOLED)  # members that are outputs of text encoders
MASK = "mask"  # (1, h, w): 1 where the model is to paint, else 0
MASKED_IMAGE = "masked_image"  # the posterior of the image that is 0 where the mask is 1; as `LATENT`
EDIT = "edit"  # the latent of the image before the edit (C, h, w): its posterior's mode, unscaled
MAPS = (MASK, MASKED_IMAGE, EDIT)  # members that are maps of the latent's size
# Members that a sample has several of. The further ones have a number: `mask`, `mask.1`, `mask.2`.
NUMBERED = (MASK, MASKED_IMAGE)
STORED = np.float16  # the type of stored latents and encodings

STREAM = "stream"  # B strings: each names the random numbers which a training step draws for its sample
IS_PRIOR = "is_prior"  # bool (B,): samples that are there to be remembered
# Questions and answers of a frozen model about a prior's sample: a timestep, an integer from 0, (B,); the noise
# (B, C, h, w); and the output (B, C, h, w), whatever it predicts. A stored sample has K of each.
TIMESTEPS, NOISE, PREDICTION = TEACHER_KEYS = ("t", "noise", "prediction")

TEXT_KEYS = ("txt", "json")  # members that are not arrays
CAPTION, ORIGIN = TEXT_KEYS

# Entries of `json`, in pixels and [height, width] or [top, left] each: the size of the image, the corner of the crop
# once the image is scaled, and the size of the crop (arXiv:2307.01952, section 2.2).
ORIGINAL_SIZE, CROP, TARGET_SIZE = SIZES = ("original_size", "crop_top_left", "target_size")
# Batch entries (B, 2) of sizes, by our names and by those of SDXL's released config, and what each is in `json`.
SIZE_ENTRIES = {
    **{name: name for name in SIZES},
    "original_size_as_tuple": ORIGINAL_SIZE,
    "crop_coords_top_left": CROP,
    "target_size_as_tuple": TARGET_SIZE,
}

# Posteriors are read with log variances in this range. Unclamped ones need not fit in float16.
LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


def member_extension(key: str) -> str:
    """Return the end of the member's name that holds `key`: `f8` is in `<sample>.f8.npy`, `txt` in `<sample>.txt`."""
    if key in SIZE_ENTRIES:
        return ORIGIN
    return key if key in TEXT_KEYS else f"{key}.npy"


def is_array(key: str) -> bool:
    """Return whether `key` is a member of its own that holds an array."""
    return key not in TEXT_KEYS and key not in SIZE_ENTRIES


def numbered(key: str, number: int) -> str:
    """Return the name of the member `key` with that number, from 0."""
    return f"{key}.{number}" if number else key


def plain(key: str) -> str:
    """Return the name of the member `key` without its number."""
    name, _, number = key.rpartition(".")
    return name if name in NUMBERED and number.isdigit() else key


def number_types(key: str) -> tuple[str, ...]:
    """Return the numpy types that the array under `key` may have."""
    return npy.INTEGERS if key == TIMESTEPS else npy.FLOATS


def null_path(folder: Path, key: str = CONTEXT) -> Path:
    """Return the file beside the shards in `folder` with the encoding `key` of the empty caption."""
    return folder / f"null.{member_extension(key)}"


def blank_key(height: int, width: int) -> str:
    """Return the name, for `null_path`, of `MASKED_IMAGE` (2C, `height`, `width`) where all of the image is masked."""
    return f"{MASKED_IMAGE}.{height}x{width}"


def null_paths(folder: Path) -> list[Path]:
    """Return the files beside the shards in `folder` that stand for nothing, of captions and masked images."""
    return sorted(folder.glob("null.*.npy"))


def sizes_of(original: Sequence[int], crop: Sequence[int], target: Sequence[int]) -> dict[str, list[int]]:
    """Return the entries of `json` for an image of `original` size, cropped to `crop`, and scaled to `target` size.

    `crop` is top, left, height and width in the original. SDXL counts crops in pixels of the scaled image.
    """
    corner = [(2 * start * to + side) // (2 * side) for start, side, to in zip(crop[:2], crop[2:], target, strict=True)]
    return {ORIGINAL_SIZE: list(original), CROP: corner, TARGET_SIZE: list(target)}


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
        others: further arrays by key, such as masks, or the teacher's.
    """
    arrays = {LATENT: latent, **encodings}
    members = {member_extension(key): npy.encode(array) for key, array in arrays.items()}
    members |= {CAPTION: caption.encode(), ORIGIN: json.dumps(origin).encode()}
    return members | {member_extension(key): npy.encode(array) for key, array in (others or {}).items()}


def index_shapes(latents: Iterable[Iterable[int]], encodings: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what an index says of the shapes: all those of latents, and that of each encoding."""
    return {LATENT: [list(shape) for shape in latents], **{key: list(value.shape) for key, value in encodings.items()}}
