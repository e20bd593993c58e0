"""Samples with several variants of an image, random crops with other colours. Training chooses one per epoch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.loader import seeded
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.kinds import DepthSamples, EditSamples, ImageSamples, MaskedSamples
from ldm.encoding.read import FittedImage, read_fitted
from ldm.images.buckets import Size
from ldm.images.colours import ColorJitter
from ldm.images.find import ImageItem
from ldm.images.transforms import Crop, centre_crop
from ldm.util import refuse_if

LEAST_AREA = 0.8  # default of `Variants.area`
_HUE = 0.1  # of the jitter of the other properties, which hues exceed in effect


@dataclass(frozen=True)
class Variants:
    """Variants of an image, which depend on its name alone. The first is the plain image.

    Args:
        count: number of variants.
        area: least area of a random crop, as a share of the largest crop of the same proportions.
        jitter: greatest change of brightness, contrast and saturation; hues turn by up to a tenth of it.
    """

    count: int = 1
    area: float = LEAST_AREA
    jitter: float = 0.0

    def crops(self, name: str, height: int, width: int, size: Size) -> list[Crop]:
        """Return the crops of the variants of an image of `height` and `width`, with the proportions of `size`."""
        found = [centre_crop(height, width, *size)]
        for number in range(1, self.count):
            stream = random.Random(f"{name}/{number}/crop")
            side = stream.uniform(self.area, 1.0) ** 0.5
            rows, columns = (max(1, round(side * length)) for length in found[0][2:])
            found.append((stream.randint(0, height - rows), stream.randint(0, width - columns), rows, columns))
        return found

    def coloured(self, name: str, number: int, pixels: np.ndarray) -> np.ndarray:
        """Return the colours of variant `number` for its crop, uint8 (3, H, W)."""
        if not self.jitter or not number:
            return pixels
        change = ColorJitter(self.jitter, self.jitter, self.jitter, _HUE * self.jitter)
        with seeded(random.Random(f"{name}/colour").getrandbits(32), 0, number):
            image = change(Image.fromarray(pixels.transpose(1, 2, 0)))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class VariantSamples(ImageSamples):
    """Samples of the kind `inner`, whose arrays (B, K, ...) hold the K variants of each image.

    Raises:
        UserError: `inner` are samples for inpainting or with depth maps, or pairs of images.
    """

    def __init__(self, inner: ImageSamples, variants: Variants) -> None:
        option = f"--variants {variants.count}"
        refuse_if(
            isinstance(inner, MaskedSamples),
            f"{option}: not for inpainting, which has masks of its own; give --masks for more variety",
        )
        refuse_if(
            isinstance(inner, DepthSamples),
            f"{option}: not for depth models, whose maps are of the plain image; leave it out",
        )
        refuse_if(
            isinstance(inner, EditSamples),
            f"{option}: not for pairs of images, which would need equal crops and colours; leave it out",
        )
        self.inner, self.variants = inner, variants
        self.members = inner.members

    @property
    def settings(self) -> dict[str, Any]:
        own = {"variants": self.variants.count, "variant_area": self.variants.area}
        return {**self.inner.settings, **own, "variant_jitter": self.variants.jitter}

    def read(self, number: int, item: ImageItem, sizes: Sequence[Size]) -> FittedImage:
        image = read_fitted(number, item, sizes, partial(self.variants.crops, item.name))
        variants = [
            replace(view, pixels=self.variants.coloured(item.name, place, view.pixels))
            for place, view in enumerate(image.variants, 1)
        ]
        return replace(image, variants=variants)

    def encode(self, encoder: SampleEncoder, images: Sequence[FittedImage], flip: bool) -> dict[str, Tensor]:
        views = zip(*(image.views for image in images), strict=True)
        encoded = [self.inner.encode(encoder, view, flip) for view in views]
        return {key: torch.stack([arrays[key] for arrays in encoded], dim=1) for key in encoded[0]}
