"""Tensors to images: one place for the range, the rounding and the grid."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.files import atomic_write

_COMPARED = 32  # pixels a side of what is compared: a shift of one pixel does not count much
_GAP = 2  # black pixels between and around the images of a grid


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, 1 or 3, H, W) in [-1, 1] as uint8 (N, H, W, 3), clamped and rounded to nearest; NaN is black."""
    images = images.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    images = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (N, H, W, 3)
    return ((images + 1.0) * 127.5).round().to(torch.uint8).numpy()


def to_images(images: Tensor) -> list[Image.Image]:
    """Images (N, 1 or 3, H, W) in [-1, 1] as a list of N RGB images."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def image_grid(batch: Tensor, columns: int | None = None) -> Image.Image:
    """Images (N, 1 or 3, H, W) in [-1, 1] side by side, row by row; by default as square a grid as can be."""
    images = to_uint8(batch)
    count, height, width, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    grid = np.zeros((_GAP + rows * (height + _GAP), _GAP + columns * (width + _GAP), 3), dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
        grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid)


def image_distances(first: Tensor, second: Tensor) -> Tensor:
    """(N, M) distances of images (N, 3, H, W) and (M, 3, H', W') in [-1, 1], from 0 to 1.

    Root mean square differences of RGB values in [0, 1], both first averaged down to 32×32, or to the smallest side.
    """
    side = min(_COMPARED, *first.shape[-2:], *second.shape[-2:])
    small = [
        F.interpolate((images.float().clamp(-1, 1) + 1) / 2, (side, side), mode="area").flatten(1)
        for images in (first, second)
    ]
    # By differences: a matrix product is not exactly 0 for an image and itself.
    return torch.cdist(*small, compute_mode="donot_use_mm_for_euclid_dist") / small[0].shape[1] ** 0.5


def save_png(image: Image.Image, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write `image` to `path` atomically, with `metadata` as PNG text entries."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
