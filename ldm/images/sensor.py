"""Simulation of camera sensor noise. The image is converted to raw data, shot and read noise is added, and the image
is converted back.

Steps and noise levels follow "Unprocessing Images for Learned Raw Denoising" (arXiv:1811.11127), without a colour
matrix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images.pixels import random_between

_GAMMA = 2.2
_LEAST = 1e-8


def sensor_noise(pixels: Tensor) -> Tensor:
    """Return an RGB image (3, H, W) in [0, 1] with the noise of a camera sensor."""
    gains = torch.tensor([random_between(1.9, 2.4), 1.0, random_between(1.5, 1.9)])[:, None, None]  # section 3.2
    linear = _undo_tone_curve(pixels).clamp(min=_LEAST) ** _GAMMA / gains
    shot = math.exp(random_between(math.log(1e-4), math.log(0.012)))  # equations 1 and 2
    read = math.exp(2.18 * math.log(shot) + 1.2 + 0.26 * float(torch.randn(1)))
    mask = bayer_mask(pixels.shape[1], pixels.shape[2])
    seen = linear * mask  # each sensor pixel measures one colour
    seen = (seen + (shot * seen + read).sqrt() * torch.randn_like(seen)) * mask
    developed = (demosaic(seen, mask) * gains).clamp(_LEAST, 1) ** (1 / _GAMMA)
    return _tone_curve(developed)


def _tone_curve(values: Tensor) -> Tensor:
    return 3 * values**2 - 2 * values**3  # smoothstep


def _undo_tone_curve(values: Tensor) -> Tensor:
    return 0.5 - torch.sin(torch.asin((1 - 2 * values).clamp(-1, 1)) / 3)


def bayer_mask(height: int, width: int) -> Tensor:
    """Return a mask (3, H, W), 1 where a sensor with the pattern RGGB measures the channel."""
    rows, columns = torch.arange(height)[:, None] % 2, torch.arange(width) % 2
    red, blue = (rows == 0) & (columns == 0), (rows == 1) & (columns == 1)
    return torch.stack([red, ~(red | blue), blue]).float()


def demosaic(seen: Tensor, mask: Tensor) -> Tensor:
    """Fill the values of `seen` where `mask` (3, H, W) is 0 with the mean of known neighbours, nearest first."""
    near = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).expand(3, 1, 3, 3)
    total, weight = (F.conv2d(F.pad(x[None], (1,) * 4), near, groups=3)[0] for x in (seen, mask))
    return torch.where(mask > 0, seen, total / weight.clamp(min=1.0))
