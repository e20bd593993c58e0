"""Colour transforms of PIL images and RGB tensors (..., 3, H, W), with torchvision's names, arguments and formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ldm.images.pixels import ImageLike
from ldm.util import UserError, check_number, refuse_if

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601


def _grey(image: Tensor) -> Tensor:
    """Return the luma (..., 1, H, W) of an RGB tensor, in its dtype."""
    red, green, blue = image.float().unbind(-3)
    grey = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(-3)
    return grey if image.is_floating_point() else grey.floor().to(image.dtype)


def _mix(image: Tensor, other: Tensor, factor: float) -> Tensor:
    """Return factor · image + (1 − factor) · other, clamped to the range of the dtype."""
    top = 1.0 if image.is_floating_point() else 255.0
    return (factor * image.float() + (1 - factor) * other.float()).clamp(0, top).to(image.dtype)


def _brightness(image: ImageLike, factor: float) -> ImageLike:
    if not isinstance(image, Tensor):
        return ImageEnhance.Brightness(image).enhance(factor)
    return _mix(image, torch.zeros_like(image), factor)


def _contrast(image: ImageLike, factor: float) -> ImageLike:
    if not isinstance(image, Tensor):
        return ImageEnhance.Contrast(image).enhance(factor)
    return _mix(image, _grey(image).float().mean((-3, -2, -1), keepdim=True), factor)


def _saturation(image: ImageLike, factor: float) -> ImageLike:
    if not isinstance(image, Tensor):
        return ImageEnhance.Color(image).enhance(factor)
    return _mix(image, _grey(image), factor)


def _hue(image: ImageLike, turn: float) -> ImageLike:
    """Return `image` with its hues rotated by `turn` of the colour circle, from -0.5 to 0.5."""
    if isinstance(image, Tensor):
        return _turn_tensor(image, turn)
    if image.mode in ("1", "L", "I", "F"):
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + int(turn * 255)) % 256  # bytes overflow
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert(image.mode)


def _turn_tensor(image: Tensor, turn: float) -> Tensor:
    """Rotate hues in HSV: V is the maximum of the channels, C their range, H the hue."""
    top = 1.0 if image.is_floating_point() else 255.0
    rgb = image.float() / top
    value, least = rgb.amax(-3), rgb.amin(-3)
    span = value - least
    red, green, blue = rgb.unbind(-3)
    safe = torch.where(span == 0, torch.ones_like(span), span)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixths = (sixths + 6 * turn) % 6
    # A channel is V - C if the hue differs from its own by a third of the circle or more.
    channels = []
    for offset in (5, 3, 1):
        distance = (offset + sixths) % 6
        channels.append(value - span * torch.minimum(distance, 4 - distance).clamp(0, 1))
    turned = torch.stack(channels, -3) * top
    return (turned if image.is_floating_point() else turned.round()).clamp(0, top).to(image.dtype)


def _range(name: str, given: float | Sequence[float], centre: float, least: float, most: float) -> tuple[float, float]:
    """Return the range of a factor. A number is the distance from `centre`, and a pair is the range."""
    if isinstance(given, Sequence):
        low, high = given if len(given) == 2 else (most, least)
    elif given < 0:
        low, high = most, least  # an invalid range, refused below
    else:
        low, high = max(centre - given, least), centre + given
    if not least <= low <= high <= most:
        raise UserError(f"{name} {given!r}: give a number of at least 0, or a range from {least:g} to {most:g}")
    return float(low), float(high)


class ColorJitter:
    """Random change of brightness, contrast, saturation and hue, in random order.

    Args:
        brightness, contrast, saturation: factors are sampled from [1 - x, 1 + x], or from the range [a, b].
        hue: rotations are sampled from [-x, x] of the colour circle, x ≤ 0.5, or from the range [a, b].
    """

    def __init__(
        self,
        brightness: float | Sequence[float] = 0,
        contrast: float | Sequence[float] = 0,
        saturation: float | Sequence[float] = 0,
        hue: float | Sequence[float] = 0,
    ) -> None:
        far = float("inf")
        self.changes: list[tuple[Callable, tuple[float, float], float]] = [
            (_brightness, _range("brightness", brightness, 1, 0, far), 1.0),
            (_contrast, _range("contrast", contrast, 1, 0, far), 1.0),
            (_saturation, _range("saturation", saturation, 1, 0, far), 1.0),
            (_hue, _range("hue", hue, 0, -0.5, 0.5), 0.0),
        ]

    def __call__(self, image: ImageLike) -> ImageLike:
        for index in torch.randperm(len(self.changes)).tolist():
            change, (low, high), unchanged = self.changes[index]
            if (low, high) != (unchanged, unchanged):
                image = change(image, float(torch.empty(1).uniform_(low, high)))
        return image


class Grayscale:
    """Conversion to luma, in one channel or in three equal channels."""

    def __init__(self, num_output_channels: int = 1) -> None:
        refuse_if(num_output_channels not in (1, 3), f"num_output_channels {num_output_channels!r}: give 1 or 3")
        self.channels = num_output_channels

    def __call__(self, image: ImageLike) -> ImageLike:
        if isinstance(image, Tensor):
            grey = _grey(image) if image.shape[-3] == 3 else image
            return grey.expand(*grey.shape[:-3], self.channels, *grey.shape[-2:])
        grey = image.convert("L")
        return grey if self.channels == 1 else Image.merge("RGB", (grey, grey, grey))


class RandomGrayscale:
    """Conversion to luma with probability `p`, with an unchanged number of channels."""

    def __init__(self, p: float = 0.1) -> None:
        check_number("p", p, least=0, most=1, whole=False)
        self.p = p

    def __call__(self, image: ImageLike) -> ImageLike:
        if torch.rand(1) >= self.p:
            return image
        channels = image.shape[-3] if isinstance(image, Tensor) else len(image.getbands())
        return Grayscale(3 if channels == 3 else 1)(image)
