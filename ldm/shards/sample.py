"""Sample format: members of a sample, their types, and the batch entries of the same names.

A sample `<key>` of a shard has the members `<key>.f8.npy`, `<key>.t5.npy`, `<key>.txt` and `<key>.json`. Model families
add members: SDXL `pooled.npy`, and sizes in the `json`; inpainting `mask.npy` and `masked_image.npy` for each mask;
InstructPix2Pix `edit.npy`; SD 2 depth `depth.npy`. A teacher adds its members, and the masked loss `loss_mask.npy`. The
files `null.<name>.npy` beside the shards hold the encodings of the empty caption and of a completely masked image.

A sample with K variants of its image has a further, first dimension of size K in the latent, the loss mask and the
depth. The list `VARIANTS` of its `json` then has `crop` and `crop_top_left` of the variants after the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ldm.remote.path import RemotePath
from ldm.shards import npy
from ldm.util import UserError

Folder = TypeVar("Folder", Path, RemotePath)

LATENT = "f8"  # mean and log-variance of a posterior (2C, h, w), or a latent (C, h, w), unscaled
CONTEXT = "t5"  # hidden states of the text encoder (77, D)
POOLED = "pooled"  # pooled state of a second text encoder (E,)
# Members with outputs of text encoders, and the number of their dimensions. A sample with K captions has a further,
# first dimension of size K, and one caption per line of `txt`.
TEXT_ENCODINGS = {CONTEXT: 2, POOLED: 1}
MASK = "mask"  # (1, h, w): 1 where the model paints, else 0
MASKED_IMAGE = "masked_image"  # as `LATENT`, for the image with 0 where the mask is 1
EDIT = "edit"  # latent of the image before the edit (C, h, w), the posterior's mode, unscaled
DEPTH = "depth"  # (1, h, w): estimated depth, larger for nearer, as the depth network gives it
MAPS = (MASK, MASKED_IMAGE, EDIT, DEPTH)  # members that condition a model, with the size of the latent
LOSS_MASK = "loss_mask"  # (1, h, w), in [0, 1]: white share of each cell, 1 where the masked loss counts fully
OF_LATENT_SIZE = (*MAPS, LOSS_MASK)
# Members that a sample may have several times, with a number: `mask`, `mask.1`, `mask.2`.
NUMBERED = (MASK, MASKED_IMAGE)
STORED = np.float16  # dtype of stored latents and encodings

STREAM = "stream"  # B strings: names of the random streams of the samples
QUANTILE = "quantile"  # float (B,): places of the timesteps of held-out samples among all, from 0 to 1
IS_PRIOR = "is_prior"  # bool (B,): True for prior samples
# Predictions of a frozen model on prior samples: the timestep (B,), counted from 0; the noise (B, C, h, w); and the
# model's output (B, C, h, w). A stored sample has K of each.
TIMESTEPS, NOISE, PREDICTION = TEACHER_KEYS = ("t", "noise", "prediction")

TEXT_KEYS = ("txt", "json")  # members that are not arrays
CAPTION, ORIGIN = TEXT_KEYS

# Entries of `json` in pixels, [height, width] or [top, left]: size of the image, corner of the crop in the scaled
# image, and size of the crop (arXiv:2307.01952, section 2.2).
ORIGINAL_SIZE, CROP, TARGET_SIZE = SIZES = ("original_size", "crop_top_left", "target_size")
VARIANTS = "variants"
# Batch entries (B, 2) of sizes, by this package's names and those of SDXL's released config: the entry of `json`.
SIZE_ENTRIES = {
    **{name: name for name in SIZES},
    "original_size_as_tuple": ORIGINAL_SIZE,
    "crop_coords_top_left": CROP,
    "target_size_as_tuple": TARGET_SIZE,
}

# Log-variances of posteriors are clamped to this range. Other values may not fit in float16.
LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


def member_extension(key: str) -> str:
    """Return the extension of the member `key`, such as `f8.npy` for `f8` and `txt` for `txt`."""
    if key in SIZE_ENTRIES:
        return ORIGIN
    return key if key in TEXT_KEYS else f"{key}.npy"


def is_array(key: str) -> bool:
    """Return True if `key` is a member with an array."""
    return key not in TEXT_KEYS and key not in SIZE_ENTRIES


def numbered(key: str, number: int) -> str:
    """Return the name of the member `key` with the given number, counted from 0."""
    return f"{key}.{number}" if number else key


def plain(key: str) -> str:
    """Return the name of the member `key` without its number."""
    name, _, number = key.rpartition(".")
    return name if name in NUMBERED and number.isdigit() else key


def number_types(key: str) -> tuple[str, ...]:
    """Return the valid numpy types of the array `key`."""
    return npy.INTEGERS if key == TIMESTEPS else npy.FLOATS


def null_path(folder: Folder, key: str = CONTEXT) -> Folder:
    """Return the path of the encoding `key` of the empty caption, for the shards in `folder`."""
    return folder / f"null.{member_extension(key)}"


def blank_key(height: int, width: int) -> str:
    """Return the name, for `null_path`, of a completely masked `MASKED_IMAGE` (2C, `height`, `width`)."""
    return f"{MASKED_IMAGE}.{height}x{width}"


def null_paths(folder: Path) -> list[Path]:
    """Return the files `null.*.npy` in `folder`, for empty captions and completely masked images."""
    return sorted(folder.glob("null.*.npy"))


def sizes_of(original: Sequence[int], crop: Sequence[int], target: Sequence[int]) -> dict[str, list[int]]:
    """Return the sizes in `json` for an image of `original` size, cropped to `crop` and scaled to `target` size.

    `crop` is top, left, height and width in the original. SDXL has crops in pixels of the scaled image.
    """
    corner = [(2 * start * to + side) // (2 * side) for start, side, to in zip(crop[:2], crop[2:], target, strict=True)]
    return {ORIGINAL_SIZE: list(original), CROP: corner, TARGET_SIZE: list(target)}


def caption_count(key: str, shape: Sequence[int]) -> int | None:
    """Return the number of captions in the encoding `key` of this `shape`, or None if it has no dimension for them."""
    return shape[0] if key in TEXT_ENCODINGS and len(shape) == TEXT_ENCODINGS[key] + 1 else None


def one_caption(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` without the dimension for several captions, if it has one."""
    return shape if caption_count(key, shape) is None else shape[1:]


def with_caption(sample: dict[str, Any], choose: Callable[[int], int], name: str) -> dict[str, Any]:
    """Return `sample` with one of its captions and its encodings; `choose` maps their number to the chosen one.

    Raises:
        UserError: its members have different numbers of captions. The message names `name`.
    """
    keys = [key for key in TEXT_ENCODINGS if isinstance(sample.get(key), np.ndarray)]
    counts = {key: caption_count(key, sample[key].shape) for key in keys}
    captions = sample[CAPTION].split("\n")
    if not keys:  # the text alone is read, and its last line may end too
        captions = list(filter(str.strip, captions))
    if all(count is None for count in counts.values()) and (keys or len(captions) < 2):
        return sample
    if keys and set(counts.values()) != {len(captions)}:
        found = ", ".join(f"{count or 'no number'} of {key}" for key, count in counts.items())
        raise UserError(f"{name}: has {len(captions)} captions, but {found}; encode the images again")
    chosen = choose(len(captions))
    return {**sample, CAPTION: captions[chosen], **{key: sample[key][chosen] for key in keys}}


def one_variant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the `shape` of a latent or map without the dimension for several variants, if it has one."""
    return shape[1:] if len(shape) == 4 else shape


def with_variant(sample: dict[str, Any], latent: str, choose: Callable[[int], int], name: str) -> dict[str, Any]:
    """Return `sample` with one of the variants of its image; `choose` maps their number to the chosen one.

    Args:
        latent: key of the latent.

    Raises:
        UserError: the sample has another number of crops than of variants. The message names `name`.
    """
    if sample[latent].ndim < 4:
        return sample
    count = len(sample[latent])
    crops = [key for key, entry in SIZE_ENTRIES.items() if entry == CROP and key in sample]
    for key in crops:
        if sample[key].shape != (count, 2):
            found = len(sample[key]) if sample[key].ndim == 2 else 1
            raise UserError(
                f"{name}: has {count} variants, but its json lists the crops of {found}; encode the images again"
            )
    chosen = choose(count)
    keys = [latent, *(key for key in sample if plain(key) in OF_LATENT_SIZE), *crops]
    return {**sample, **{key: sample[key][chosen] for key in keys}}


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
        others: further arrays by key, such as masks or those of a teacher.
    """
    arrays = {LATENT: latent, **encodings}
    members = {member_extension(key): npy.encode(array) for key, array in arrays.items()}
    members |= {CAPTION: caption.encode(), ORIGIN: json.dumps(origin).encode()}
    return members | {member_extension(key): npy.encode(array) for key, array in (others or {}).items()}


def index_shapes(latents: Iterable[Iterable[int]], encodings: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the entries of an index for shapes: all shapes of latents, and the shape of each encoding."""
    return {LATENT: [list(shape) for shape in latents], **{key: list(value.shape) for key, value in encodings.items()}}
