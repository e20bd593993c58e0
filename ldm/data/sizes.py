"""Check before training that image sizes are multiples of the model's downsampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm.util import UserError

_CHANNELS = (1, 3, 4)


def check_sizes(model: Any, sample: Any, split: str) -> None:
    """Raise `UserError` if `model` cannot halve the image in `sample`, of the dataset `split`, evenly.

    The image is the entry `first_stage_key`, or `image_key` of an autoencoder, channels last or first. Other samples
    are not checked.
    """
    key = getattr(model, "first_stage_key", None) or getattr(model, "image_key", None)
    if key is None or not isinstance(sample, Mapping) or key not in sample:
        return
    try:
        entry = torch.as_tensor(sample[key])
    except (TypeError, ValueError, RuntimeError):
        return
    is_encoded = getattr(model, "is_pre_encoded", None)
    if entry.ndim == 3 and is_encoded is not None and is_encoded(entry[None]):
        return
    size = _height_and_width(tuple(entry.shape))
    multiple = multiple_of(model)
    if size is None or not any(side % multiple for side in size):
        return
    near = " or ".join(str(side) for side in _around(max(size), multiple))
    raise UserError(
        f"the {split} data: {key!r} of the first sample has {size[0]}x{size[1]} pixels, which do not halve evenly in "
        f"the model; give a size in multiples of {multiple}, such as {near}"
    )


def multiple_of(model: Any) -> int:
    """Return the required divisor of image sides in pixels for `model`, or 1 if unknown."""
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    parts = (model, getattr(model, "first_stage_model", None), unet)
    multiple = 1
    for part in parts:
        factor = getattr(part, "downsampling", 1)
        multiple *= factor if isinstance(factor, int) else 1
    return multiple


def _height_and_width(shape: Sequence[int]) -> tuple[int, int] | None:
    if len(shape) == 2:  # a label map
        return shape[0], shape[1]
    if len(shape) == 3 and shape[2] in _CHANNELS:
        return shape[0], shape[1]
    if len(shape) == 3 and shape[0] in _CHANNELS:
        return shape[1], shape[2]
    return None


def _around(side: int, multiple: int) -> list[int]:
    below = side // multiple * multiple
    return [size for size in (below, below + multiple) if size]
