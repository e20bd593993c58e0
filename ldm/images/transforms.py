"""Transforms from a decoded image to the input of the autoencoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_BAND = 1024  # rows

Crop = tuple[int, int, int, int]  # top, left, height and width, in pixels


def centre_crop(height: int, width: int, to_height: int, to_width: int) -> Crop:
    """Return top, left, height and width, in pixels, of the largest centre crop with the given aspect ratio.

    The aspect ratio is exact to the nearest pixel.
    """
    if width * to_height > height * to_width:
        cropped = height, max(1, (2 * height * to_width + to_height) // (2 * to_height))
    else:
        cropped = max(1, (2 * width * to_height + to_width) // (2 * to_width)), width
    return (height - cropped[0]) // 2, (width - cropped[1]) // 2, *cropped


def fit(image: torch.Tensor, height: int, width: int, crop: Crop | None = None) -> torch.Tensor:
    """Crop a uint8 (H, W, 3) image, and scale it to uint8 (3, height, width). The default is `centre_crop`.

    The crop comes first, so that an elongated image costs no more than a square one. The filter is torch's cubic,
    widened by the scale like Pillow's `BICUBIC`. The result of kornia's filter is 4 to 7 times farther from Pillow's.
    Columns are scaled in bands of rows, so that a large image is never completely in floating point.
    """
    top, left, rows, columns = crop or centre_crop(image.shape[0], image.shape[1], height, width)
    cropped = image[top : top + rows, left : left + columns].permute(2, 0, 1)[None]  # 1 3 rows columns
    bands = [_scaled(band.float(), band.shape[2], width) for band in cropped.split(_BAND, dim=2)]
    scaled = _scaled(torch.cat(bands, dim=2), height, width)
    return scaled[0].round_().clamp_(0, 255).to(torch.uint8)


def _scaled(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False, antialias=True)


def to_range(pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels of any shape as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def fit_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """Return the centre square of a uint8 (H, W, 3) image, scaled to float32 (3, size, size) in [-1, 1]."""
    return to_range(fit(image, size, size))
