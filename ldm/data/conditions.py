"""Transforms that add conditioning to an item: low-resolution images, masks, edges.

Images of an item are float32 (h, w, 3) in [-1, 1].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.listed import to_minus_one_one
from ldm.images.degradations import degradation
from ldm.images.masks import random_mask, style_of
from ldm.images.pixels import random_between, resize
from ldm.util import check_number


class AddLR:
    """Addition of `lr`, a degraded version of the image that is `factor` times smaller.

    Args:
        factor: scale factor.
        output_size: side in pixels of the result after scaling; None for no scaling.
        initial_size: side in pixels to which the image is scaled first; None for no scaling.
        image_key: entry of the image.
    """

    def __init__(
        self, factor: int, output_size: int | None = None, initial_size: int | None = None, image_key: str = "jpg"
    ) -> None:
        check_number("postprocess.params.factor", factor, least=1)
        self.degrade = degradation("bsrgan_light", factor)
        self.output_size, self.initial_size, self.image_key = output_size, initial_size, image_key

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample[self.image_key].permute(2, 0, 1)
        if self.initial_size is not None:
            image = resize(image, self.initial_size, self.initial_size, "bicubic")
        low = to_minus_one_one(self.degrade(_to_uint8(image)))
        if self.output_size is not None:
            low = resize(low.permute(2, 0, 1), self.output_size, self.output_size, "bicubic").permute(1, 2, 0)
        return {**sample, "lr": low.clamp(-1, 1).contiguous()}


class AddMask:
    """Addition of `mask` (h, w, 1), 1 where the image is hidden, and `masked_image`, which is 0 there.

    Args:
        mode: style of `ldm.images.masks.STYLES`.
        p_drop: probability of hiding the whole image.
        image_key: entry of the image.
    """

    def __init__(self, mode: str = "512train", p_drop: float = 0.0, image_key: str = "jpg") -> None:
        self.style = style_of(mode)
        check_number("p_drop", p_drop, least=0, most=1, whole=False)
        self.p_drop, self.image_key = p_drop, image_key

    def mask(self, image: Tensor) -> Tensor:
        """Return a mask (h, w, 1) for an image (h, w, 3)."""
        if random_between(0, 1) < self.p_drop:
            return torch.ones_like(image[..., :1])
        return random_mask(*image.shape[:2], self.style)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample[self.image_key]
        mask = self.mask(image)
        return {**sample, "mask": mask, "masked_image": image * (mask < 0.5)}


class AddEdge(AddMask):
    """Addition of a mask as in `AddMask`, with the smoothed edges of the image in the hidden part.

    The smoothing is random. `smoothing_strength` (h, w, 1) is its strength in [-1, 1] in the hidden part, else 0.

    Args:
        mask_edges: show edges only in the hidden part. If false, `masked_image` has edges everywhere.
    """

    MOST = 3.0  # standard deviation of the Gaussian in pixels

    def __init__(
        self, mode: str = "512train", mask_edges: bool = True, p_drop: float = 0.0, image_key: str = "jpg"
    ) -> None:
        super().__init__(mode, p_drop, image_key)
        self.mask_edges = mask_edges

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample[self.image_key]
        mask, strength = self.mask(image), random_between(0, 1)
        drawn = edges(image, 0.3 + self.MOST * strength).expand_as(image) * 2 - 1
        shown = torch.where(mask >= 0.5, drawn, image) if self.mask_edges else drawn
        return {**sample, "mask": mask, "masked_image": shown, "smoothing_strength": mask * (strength * 2 - 1)}


def edges(image: Tensor, sigma: float) -> Tensor:
    """Return the gradient norm (h, w, 1) of the brightness of an image (h, w, 3) after a Gaussian blur, at most 1."""
    grey = image.mean(-1)[None, None]
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for shape, sides in (((1, 1, 1, -1), (reach, reach, 0, 0)), ((1, 1, -1, 1), (0, 0, reach, reach))):
        grey = F.conv2d(F.pad(grey, sides, mode="replicate"), kernel.view(shape))
    down, right = (torch.diff(grey, dim=dim, append=grey.narrow(dim, -1, 1)) for dim in (2, 3))
    steepness = (down**2 + right**2).sqrt()[0, 0, :, :, None]
    return steepness / steepness.max().clamp(min=1e-6)


def _to_uint8(image: Tensor) -> np.ndarray:
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
