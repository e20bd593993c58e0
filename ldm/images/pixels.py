"""Scaling, cropping and padding of PIL images and tensors (..., C, H, W), with the rules of torchvision and Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.util import UserError, refuse_if

ImageLike = Image.Image | Tensor
# Filters by name: the number in Pillow, and the mode for tensors if there is one.
_FILTERS = {
    "nearest": (Image.Resampling.NEAREST, "nearest"),
    "nearest-exact": (Image.Resampling.NEAREST, "nearest-exact"),
    "bilinear": (Image.Resampling.BILINEAR, "bilinear"),
    "bicubic": (Image.Resampling.BICUBIC, "bicubic"),
    "box": (Image.Resampling.BOX, None),
    "hamming": (Image.Resampling.HAMMING, None),
    "lanczos": (Image.Resampling.LANCZOS, None),
}
PADDING_MODES = {"constant": "constant", "edge": "replicate", "reflect": "reflect", "symmetric": "symmetric"}


def filter_of(interpolation: Any) -> str:
    """Return the name of a filter from its name, its number in Pillow, or an enumeration value."""
    value = getattr(interpolation, "value", interpolation)
    if isinstance(value, str) and value.lower() in _FILTERS:
        return value.lower()
    if type(value) is int:
        for name, (number, _) in _FILTERS.items():
            if number == value:
                return name
    numbers = ", ".join(f"{name} ({int(number)})" for name, (number, _) in _FILTERS.items())
    raise UserError(f"interpolation {interpolation!r}: give one of {numbers}")


def image_size(image: ImageLike) -> tuple[int, int]:
    """Return height and width of `image` in pixels."""
    return (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else (image.height, image.width)


def resize(
    image: ImageLike, height: int, width: int, filter_name: str = "bilinear", antialias: bool = True
) -> ImageLike:
    """Return `image` scaled to (height, width). `antialias` widens the filter for shrinking; Pillow always does."""
    number, mode = _FILTERS[filter_name]
    if not isinstance(image, Tensor):
        return image.resize((width, height), number)
    refuse_if(mode is None, f"interpolation {filter_name}: tensors are scaled with nearest, bilinear or bicubic")
    if image_size(image) == (height, width):
        return image
    smooth = {"align_corners": False, "antialias": antialias} if mode in ("bilinear", "bicubic") else {}
    flat = image.reshape(-1, 1, *image.shape[-2:])  # N·C 1 H W
    scaled = F.interpolate(flat if flat.is_floating_point() else flat.float(), (height, width), mode=mode, **smooth)
    if not image.is_floating_point():
        scaled = scaled.round().clamp(0, 255).to(image.dtype)
    return scaled.reshape(*image.shape[:-2], height, width)


def crop(image: ImageLike, top: int, left: int, height: int, width: int) -> ImageLike:
    """Return the part of `image` at (top, left), which must lie inside."""
    if isinstance(image, Tensor):
        return image[..., top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def pad(
    image: ImageLike, left: int, top: int, right: int, bottom: int, fill: Any = 0, mode: str = "constant"
) -> ImageLike:
    """Return `image` with the given number of pixels added on each side."""
    if not isinstance(image, Tensor):
        if mode == "constant":
            size = (image.width + left + right, image.height + top + bottom)
            padded = Image.new(image.mode, size, tuple(fill) if isinstance(fill, list) else fill)
            padded.paste(image, (left, top))
            return padded
        sides = [(top, bottom), (left, right), (0, 0)][: np.asarray(image).ndim]
        return Image.fromarray(np.pad(np.asarray(image), sides, mode=mode))
    if mode == "constant":
        return F.pad(image, (left, right, top, bottom), value=fill)
    rows = np.pad(np.arange(image.shape[-2]), (top, bottom), mode=mode)
    columns = np.pad(np.arange(image.shape[-1]), (left, right), mode=mode)
    return image[..., torch.from_numpy(rows)[:, None], torch.from_numpy(columns)]


def random_between(low: float, high: float) -> float:
    """Sample a number from [low, high) with torch's global generator."""
    return float(torch.empty(1).uniform_(low, high))


def random_below(count: int) -> int:
    """Sample a whole number below `count` with torch's global generator."""
    return int(torch.randint(0, count, (1,)))
