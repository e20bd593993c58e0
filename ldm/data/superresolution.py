"""Dataset of image pairs in high and low resolution, for super-resolution."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.listed import ListedImages, read_image, to_minus_one_one
from ldm.images.degradations import degradation
from ldm.images.pixels import crop, random_below, random_between, resize
from ldm.util import check_number, refuse_if


class PairedImages(Dataset):
    """Square crops of images, scaled to `size`, and their degraded versions.

    An item has `image`, float32 (size, size, 3), and `LR_image`, (size/f, size/f, 3), both in [-1, 1], and the labels
    of the image.

    Args:
        size: side in pixels.
        degradation: name in `ldm.images.degradations.NAMES`.
        downscale_f: ratio f of the sizes, a divisor of `size`.
        min_crop_f, max_crop_f: range of the crop's side as a share of the smaller side.
        random_crop: random crop, else centre crop.
    """

    def __init__(
        self,
        images: ListedImages,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
    ) -> None:
        check_number("size", size, least=1, unit="pixels")
        check_number("downscale_f", downscale_f, least=1)
        refuse_if(size % downscale_f, f"downscale_f {downscale_f!r}: give a whole number that divides the size, {size}")
        refuse_if(
            not 0 < min_crop_f <= max_crop_f <= 1,
            f"min_crop_f {min_crop_f} and max_crop_f {max_crop_f}: give 0 < min <= max <= 1",
        )
        self.images = images
        self.sample_keys = images.sample_keys
        self.size = size
        self.degrade = _named(degradation, downscale_f)
        self.crop_shares = (min_crop_f, max_crop_f)
        self.random_crop = random_crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        square = read_image(self.images.items[index], self._square)
        low = self.degrade(np.array(square))
        return {
            "image": to_minus_one_one(square),
            "LR_image": to_minus_one_one(low),
            **self.images.labels_of(index),
        }

    def _square(self, image: Image.Image) -> Image.Image:
        """Return a square of `image`, scaled."""
        side = max(1, int(min(image.size) * random_between(*self.crop_shares)))
        room = (image.height - side, image.width - side)
        top, left = (random_below(free + 1) if self.random_crop else free // 2 for free in room)
        return resize(
            crop(image, top, left, side, side), self.size, self.size, "box" if side > self.size else "bicubic"
        )


def _named(name: str | None, factor: int) -> Any:
    refuse_if(name is None, "degradation is missing: give one, such as bsrgan or pil_bicubic")
    return degradation(name, factor)
