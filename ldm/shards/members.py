"""Members of pre-encoded samples: which ones a sample needs, their values, and their shapes within a set."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from ldm.shards import npy
from ldm.shards.sample import (
    CAPTION,
    CROP,
    LOSS_MASK,
    MAPS,
    NUMBERED,
    OF_LATENT_SIZE,
    ORIGIN,
    POOLED,
    SIZE_ENTRIES,
    TEACHER_KEYS,
    TEXT_KEYS,
    VARIANTS,
    is_array,
    member_extension,
    number_types,
    numbered,
    plain,
)
from ldm.util import UserError, nearest, refuse_if

T = TypeVar("T")

ABSENT = {CAPTION: "", ORIGIN: None}  # values of missing members
_MOST = 1 << 24  # side in pixels; float32 is exact for integers up to this one
_OF_FAMILIES = (POOLED, *MAPS, *SIZE_ENTRIES)  # members for certain model families
_ENCODE_AGAIN = "encode the images again with the release that training starts from"
NEEDS_LOSS_MASKS = "the masked loss needs it; encode the images again with --loss-masks, or change loss_config"


def find_member(key: str, members: Mapping[str, T], optional: Container[str], sample: str, where: str) -> T | None:
    """Return the member of `key` from `members`, which are by extension. A missing member of `optional` is None.

    Raises:
        UserError: the `sample` of the shard `where` lacks a required member.
    """
    extension = member_extension(key)
    if extension not in members and key not in optional:
        hint = nearest(extension, list(members))
        if key in TEACHER_KEYS:
            hint = "; write the teacher's predictions with tools/make_prior.py --teacher, or set prior_target: data"
        if key == CAPTION:
            hint = ", the caption, which this model encodes in training; encode the images again with captions"
        if plain(key) in _OF_FAMILIES:
            hint = f", which this model family needs; {_ENCODE_AGAIN}"
        if key == LOSS_MASK:
            hint = f"; {NEEDS_LOSS_MASKS}"
        raise UserError(f"{where}: sample {sample!r} has no member {extension!r}{hint}")
    return members.get(extension)


def numbered_keys(keys: Iterable[str], members: Mapping[str, Any]) -> list[str]:
    """Return `keys` and the further numbered members that `members` has, by extension, of keys in `NUMBERED`."""
    found: list[str] = []
    for key in keys:
        found.append(key)
        number = 1
        while key in NUMBERED and member_extension(further := numbered(key, number)) in members:
            found.append(further)
            number += 1
    return found


def decode_member(key: str, data: bytearray, name: str) -> Any:
    """Return the value of one member: an array, a string (`txt`), parsed JSON (`json`), or a size in it, float32 (2,).

    The corner of the crop is float32 (K, 2) for K > 1 variants of the image.

    Raises:
        UserError: the member cannot be decoded, or an array has a value out of range. The message names `name`.
    """
    if not is_array(key):
        try:
            text = data.decode("utf-8")
            content = text if key == CAPTION else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: {error}") from error
        return content if key in TEXT_KEYS else _sizes(content, SIZE_ENTRIES[key], name)
    array = npy.decode(data, name, number_types(key))
    if not np.isfinite(array).all():
        raise UserError(f"{name}: has NaN or infinite values; encode it again")
    if key == LOSS_MASK and (array.min() < 0 or array.max() > 1):
        raise UserError(f"{name}: has values outside of 0 to 1; encode it again")
    return array


def _sizes(content: Any, entry: str, name: str) -> np.ndarray:
    """Return the `entry` of a sample's parsed `json`: float32 (2,), or (K, 2) for a crop of K > 1 variants."""
    others = content.get(VARIANTS) if isinstance(content, dict) and entry == CROP else None
    if not others:
        return _size(content, entry, name)
    if not isinstance(others, list):
        raise UserError(f"{name}: {VARIANTS} is {others!r:.80}, not a list; {_ENCODE_AGAIN}")
    return np.stack([_size(variant, entry, name) for variant in (content, *others)])


def _size(content: Any, entry: str, name: str) -> np.ndarray:
    """Return the `entry` of a sample's parsed `json`, float32 (2,)."""
    value = content.get(entry) if isinstance(content, dict) else None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 <= n <= _MOST for n in value):
        found = "no" if value is None else f"{value!r:.80} as its"
        raise UserError(f"{name}: has {found} {entry}, which must be two whole numbers of pixels; {_ENCODE_AGAIN}")
    return np.array(value, np.float32)


def check_map(key: str, shape: tuple[int, ...], latent: tuple[int, ...], name: str) -> None:
    """Raise `UserError` unless `key` has the height, the width and the number of variants of its sample's latent."""
    if plain(key) not in OF_LATENT_SIZE:
        return
    refuse_if(
        shape[-2:] != latent[-2:], f"{name}: shape {shape}, but the latent has {latent}; height and width must be equal"
    )
    refuse_if(shape[:-3] != latent[:-3], f"{name}: shape {shape}, but the latent has {latent}; variants must be equal")
    refuse_if(key == LOSS_MASK and shape[-3] != 1, f"{name}: shape {shape}; a loss mask has one channel")


def check_shape(key: str, shape: tuple[int, ...], first: tuple[int, ...], image: bool, name: str) -> None:
    """Raise `UserError` unless `shape` can share a set with the shape of the `first` sample.

    Images, (channels, height, width), may differ in height and width. All other arrays must have equal shapes, except
    for the number of captions, which `shape` lacks.
    """
    refuse_if(image and len(shape) != 3, f"{name}: shape {shape} is not (channels, height, width)")
    refuse_if(
        (shape[0] != first[0]) if image else (shape != first),
        f"{name}: shape {shape}, but {key} of the first sample has shape {first}",
    )
