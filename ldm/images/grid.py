"""Conversion of tensors to images and image grids, and distances of images."""

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

_COMPARED = 32  # side in pixels for comparisons, small so that a shift of one pixel has little effect
_GAP = 2  # black pixels between and around the images of a grid


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert images (N, 1 or 3, H, W) in [-1, 1] to uint8 (N, H, W, 3), clamped and rounded. NaN becomes black."""
    images = images.detach().float().cpu().nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    images = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (N, H, W, 3)
    return ((images + 1.0) * 127.5).round().to(torch.uint8).numpy()


def to_images(images: Tensor) -> list[Image.Image]:
    """Convert images (N, 1 or 3, H, W) in [-1, 1] to a list of N RGB images."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def image_grid(batch: Tensor, columns: int | None = None) -> Image.Image:
    """Arrange images (N, 1 or 3, H, W) in [-1, 1] in rows of `columns`. The default grid is nearly square."""
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
    """Return distances (N, M) in [0, 1] of images (N, 3, H, W) and (M, 3, H', W') in [-1, 1].

    A distance is the root mean square difference of RGB values, after averaging to 32×32 or the smallest side.
    """
    side = min(_COMPARED, *first.shape[-2:], *second.shape[-2:])
    small = [
        F.interpolate((images.float().clamp(-1, 1) + 1) / 2, (side, side), mode="area").flatten(1)
        for images in (first, second)
    ]
    # Differences, because a matrix product is not exactly 0 for equal images.
    return torch.cdist(*small, compute_mode="donot_use_mm_for_euclid_dist") / small[0].shape[1] ** 0.5


def save_png(image: Image.Image, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write `image` to `path` atomically, with `metadata` as PNG text entries."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
