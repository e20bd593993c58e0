"""The one way from a decoded image to what the autoencoder sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def centre_crop(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width, in pixels, of the largest part in the middle with the proportions asked for.

    They are met to the nearest pixel.
    """
    if width * to_height > height * to_width:
        cropped = height, max(1, (2 * height * to_width + to_height) // (2 * to_height))
    else:
        cropped = max(1, (2 * width * to_height + to_width) // (2 * to_width)), width
    return (height - cropped[0]) // 2, (width - cropped[1]) // 2, *cropped


def fit(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The centre crop of a uint8 `(H, W, 3)` image, scaled to uint8 `(3, height, width)`: it covers that size.

    Cropped before it is scaled, so that a very long image costs no more than a square one. The filter is a cubic
    widened by the scale (as Pillow's `BICUBIC`): torch's own, since kornia's blurs with a Gaussian and then drops
    pixels, which is 4 to 7 times as far from Pillow's result.
    """
    top, left, rows, columns = centre_crop(image.shape[0], image.shape[1], height, width)
    cropped = image[top : top + rows, left : left + columns].permute(2, 0, 1)[None].float()  # 1 3 rows columns
    scaled = F.interpolate(cropped, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return scaled[0].round_().clamp_(0, 255).to(torch.uint8)


def to_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of any shape as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def fit_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """The centre square of a uint8 `(H, W, 3)` image, scaled to float32 `(3, size, size)` in [-1, 1]."""
    return to_range(fit(image, size, size))
