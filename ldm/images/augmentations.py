"""Image transforms with the names and arguments of torchvision, so that its YAML configs work without it.

An image is a PIL image, or a tensor (..., C, H, W), uint8 in [0, 255] or floating point in [0, 1]. Random numbers come
from torch's global generator, which the loader seeds per sample. `ldm.moved_targets` maps `torchvision.transforms.X` to
this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.images.colours import ColorJitter, Grayscale, RandomGrayscale
from ldm.images.pixels import (
    PADDING_MODES,
    ImageLike,
    crop,
    filter_of,
    image_size,
    pad,
    random_below,
    random_between,
    resize,
)
from ldm.images.tensors import ConvertImageDtype, Normalize, PILToTensor, ToPILImage, ToTensor
from ldm.util import UserError, check_choice, check_number, instantiate_from_config, refuse_if

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "ConvertImageDtype",
    "Grayscale",
    "Normalize",
    "PILToTensor",
    "Pad",
    "RandomApply",
    "RandomCrop",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomVerticalFlip",
    "Resize",
    "ToPILImage",
    "ToTensor",
]


def build_transform(described: Any) -> Callable[[Any], Any]:
    """Return the transform of a config: None, a `target` with `params`, or a list of these in order."""
    if described is None:
        return Compose([])
    if isinstance(described, Mapping):
        return instantiate_from_config(described)
    if isinstance(described, Sequence) and not isinstance(described, str):
        return Compose(described)
    if callable(described):
        return described
    raise UserError(f"image_transforms {described!r}: give a list of transforms by target and params")


def _pair(size: Any, what: str = "size") -> tuple[int, int]:
    """Return height and width of a size: a whole number, a list of one, or a pair."""
    values = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else [size]
    refuse_if(
        len(values) not in (1, 2) or not all(type(value) is int and value > 0 for value in values),
        f"{what} {size!r}: give a whole number of pixels, or [height, width]",
    )
    return values[0], values[-1]


class Compose:
    """Sequence of transforms. Each is a callable, or a `target` with `params`."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = [instantiate_from_config(t) if isinstance(t, Mapping) else t for t in transforms]

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class RandomApply(Compose):
    """Sequence of `transforms` that is applied with probability `p`."""

    def __init__(self, transforms: Sequence[Any], p: float = 0.5) -> None:
        super().__init__(transforms)
        check_number("p", p, least=0, most=1, whole=False)
        self.p = p

    def __call__(self, image: Any) -> Any:
        return super().__call__(image) if torch.rand(1) < self.p else image


class Resize:
    """Scaling to `size`: a pair (height, width), or the smaller side with a fixed aspect ratio.

    Args:
        interpolation: name of a filter, or its number in Pillow (0 nearest, 2 bilinear, 3 bicubic).
        max_size: maximum of the larger side in pixels, for a single `size`.
        antialias: widen the filter when tensors shrink, as Pillow does.
    """

    def __init__(
        self, size: Any, interpolation: Any = "bilinear", max_size: int | None = None, antialias: bool | None = True
    ) -> None:
        height, width = _pair(size)
        self.exact = isinstance(size, Sequence) and len(size) == 2
        self.size = (height, width)
        refuse_if(
            max_size is not None and (self.exact or max_size <= height),
            f"max_size {max_size}: needs a single size below it, not {size}",
        )
        self.max_size = max_size
        self.filter = filter_of(interpolation)
        self.antialias = antialias is not False

    def __call__(self, image: ImageLike) -> ImageLike:
        return resize(image, *self.target(*image_size(image)), self.filter, self.antialias)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return the scaled height and width of an image of (height, width)."""
        if self.exact:
            return self.size
        short, long = min(height, width), max(height, width)
        new_short, new_long = self.size[0], self.size[0] * long // short
        if self.max_size is not None and new_long > self.max_size:
            new_short, new_long = self.max_size * new_short // new_long, self.max_size
        new_short = max(new_short, 1)
        return (new_short, new_long) if height <= width else (new_long, new_short)


class CenterCrop:
    """Centre crop of `size`, (height, width) or a square. Smaller images are padded with black."""

    def __init__(self, size: Any) -> None:
        self.size = _pair(size)

    def __call__(self, image: ImageLike) -> ImageLike:
        rows, columns = self.size
        height, width = image_size(image)
        over, across = max(rows - height, 0), max(columns - width, 0)
        if over or across:
            image = pad(image, across // 2, over // 2, (across + 1) // 2, (over + 1) // 2)
            height, width = image_size(image)
        return crop(image, round((height - rows) / 2), round((width - columns) / 2), rows, columns)


class RandomCrop:
    """Random crop of `size`, (height, width) or a square.

    Args:
        padding: pixels added first: one number, [left and right, top and bottom], or [left, top, right, bottom].
        pad_if_needed: pad an image that is smaller than `size`. Otherwise this is an error.
    """

    def __init__(
        self,
        size: Any,
        padding: Any = None,
        pad_if_needed: bool = False,
        fill: Any = 0,
        padding_mode: str = "constant",
    ) -> None:
        self.size = _pair(size)
        self.pad = None if padding is None else Pad(padding, fill, padding_mode)
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        self.pad_if_needed = pad_if_needed
        self.fill = fill
        self.padding_mode = padding_mode

    def __call__(self, image: ImageLike) -> ImageLike:
        rows, columns = self.size
        image = image if self.pad is None else self.pad(image)
        height, width = image_size(image)
        if self.pad_if_needed:
            across, over = max(columns - width, 0), max(rows - height, 0)
            image = pad(image, across, over, across, over, self.fill, self.padding_mode)
            height, width = image_size(image)
        refuse_if(
            height < rows or width < columns,
            f"RandomCrop of {rows}x{columns} from an image of {height}x{width}: "
            f"put a Resize before it, or set pad_if_needed",
        )
        if (height, width) == (rows, columns):
            return image
        top, left = random_below(height - rows + 1), random_below(width - columns + 1)
        return crop(image, top, left, rows, columns)


class RandomResizedCrop:
    """Random crop of random area and aspect ratio, scaled to `size`.

    Args:
        scale: minimum and maximum share of the area.
        ratio: minimum and maximum of width / height.
    """

    def __init__(
        self,
        size: Any,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: Any = "bilinear",
        antialias: bool | None = True,
    ) -> None:
        self.size = _pair(size)
        for name, ends in {"scale": scale, "ratio": ratio}.items():
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                raise UserError(f"{name} {list(ends)}: give the minimum and the maximum, above 0")
        self.scale, self.ratio = scale, ratio
        self.filter = filter_of(interpolation)
        self.antialias = antialias is not False

    def __call__(self, image: ImageLike) -> ImageLike:
        return resize(crop(image, *self.place(*image_size(image))), *self.size, self.filter, self.antialias)

    def place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a random part, or after ten failed attempts of the centre."""
        for _ in range(10):
            area = height * width * random_between(*self.scale)
            ratio = math.exp(random_between(*map(math.log, self.ratio)))
            columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < columns <= width and 0 < rows <= height:
                return random_below(height - rows + 1), random_below(width - columns + 1), rows, columns
        low, high = self.ratio
        ratio = min(max(width / height, low), high)
        rows, columns = min(height, round(width / ratio)), min(width, round(height * ratio))
        return (height - rows) // 2, (width - columns) // 2, rows, columns


class RandomHorizontalFlip:
    """Horizontal flip with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        check_number("p", p, least=0, most=1, whole=False)
        self.p = p

    def __call__(self, image: ImageLike) -> ImageLike:
        if torch.rand(1) >= self.p:
            return image
        return image.flip(-1) if isinstance(image, Tensor) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class RandomVerticalFlip:
    """Vertical flip with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        check_number("p", p, least=0, most=1, whole=False)
        self.p = p

    def __call__(self, image: ImageLike) -> ImageLike:
        if torch.rand(1) >= self.p:
            return image
        return image.flip(-2) if isinstance(image, Tensor) else image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


class Pad:
    """Padding: one number, [left and right, top and bottom], or [left, top, right, bottom]."""

    def __init__(self, padding: Any, fill: Any = 0, padding_mode: str = "constant") -> None:
        values = list(padding) if isinstance(padding, Sequence) else [padding]
        refuse_if(
            len(values) not in (1, 2, 4) or not all(type(value) is int and value >= 0 for value in values),
            f"padding {padding!r}: give one, two or four whole numbers",
        )
        check_choice("padding_mode", padding_mode, PADDING_MODES)
        self.sides = (values * 4)[:4]  # left, top, right, bottom
        self.fill, self.padding_mode = fill, padding_mode

    def __call__(self, image: ImageLike) -> ImageLike:
        return pad(image, *self.sides, self.fill, self.padding_mode)
