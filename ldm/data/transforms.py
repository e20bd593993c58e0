"""The one way from a decoded picture to what the autoencoder sees; runs where its tensor is."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def centre_square(height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side, in pixels, of the largest square in the middle."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def fit_square(picture: torch.Tensor, size: int) -> torch.Tensor:
    """The centre square of a uint8 `(H, W, 3)` picture, scaled to float32 `(3, size, size)` in [-1, 1].

    Cropped before it is scaled, so that a very long picture costs no more than a square one. The filter is a cubic
    widened by the scale (as Pillow's `BICUBIC`), on the device of `picture`: torch's own, since kornia's blurs with a
    Gaussian and then drops pixels, which is 4 to 7 times as far from Pillow's result.
    """
    top, left, side = centre_square(picture.shape[0], picture.shape[1])
    square = picture[top : top + side, left : left + side].permute(2, 0, 1)[None].float()  # 1 3 side side
    scaled = F.interpolate(square, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return scaled[0].round_().clamp_(0, 255).div_(127.5).sub_(1)  # rounded: the same input on every device
