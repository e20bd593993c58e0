"""Random masks for inpainting: strokes and boxes, by LaMa (arXiv:2109.07161, section 2.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.images.pixels import random_below, random_between
from ldm.util import UserError, nearest


@dataclass(frozen=True)
class MaskStyle:
    """Sizes of strokes and boxes. Lengths are shares of the smaller side of the image."""

    strokes: float  # probability of strokes, as opposed to boxes
    most_strokes: int
    most_corners: int  # maximum corners of a stroke
    length: float  # maximum distance of two corners
    width: float  # maximum width
    most_boxes: int
    box: tuple[float, float]  # minimum and maximum side


_WIDE = MaskStyle(0.5, 5, 5, 0.4, 0.4, 4, (0.12, 0.6))
_NARROW = MaskStyle(0.5, 50, 5, 0.16, 0.04, 4, (0.04, 0.2))
_LARGE = MaskStyle(0.5, 5, 5, 0.85, 0.85, 5, (0.3, 0.9))
STYLES = {
    "256train": _WIDE,
    "512train": _WIDE,
    "512train-large": _LARGE,
    "256narrow": _NARROW,
    "512narrow": _NARROW,
}


def style_of(mode: str) -> MaskStyle:
    """Return the style `mode`. Raise `UserError` if it is unknown."""
    if mode not in STYLES:
        raise UserError(f"mode {mode!r} is unknown{nearest(str(mode), list(STYLES))}")
    return STYLES[mode]


def random_mask(height: int, width: int, style: MaskStyle) -> Tensor:
    """Return a mask (height, width, 1), 1 where the image is hidden. It always hides a part of the image."""
    canvas = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    if random_between(0, 1) < style.strokes:
        for _ in range(1 + random_below(style.most_strokes)):
            _draw_stroke(draw, height, width, style)
    else:
        for _ in range(1 + random_below(style.most_boxes)):
            _draw_box(draw, height, width, style)
    return torch.from_numpy(np.array(canvas)).float()[..., None]


def _draw_stroke(draw: ImageDraw.ImageDraw, height: int, width: int, style: MaskStyle) -> None:
    """Draw a chain of lines with round ends and alternating directions inside the image."""
    side = min(height, width)
    x, y = random_between(0, width), random_between(0, height)
    thickness = max(1, round(side * random_between(style.width / 4, style.width)))
    for corner in range(1 + random_below(style.most_corners)):
        angle = random_between(0, math.pi / 4) + (math.pi if corner % 2 else 0)
        length = side * random_between(0.05, style.length)
        to_x = min(max(x + length * math.sin(angle), 0), width - 1)
        to_y = min(max(y + length * math.cos(angle), 0), height - 1)
        draw.line((x, y, to_x, to_y), fill=1, width=thickness)
        for centre_x, centre_y in ((x, y), (to_x, to_y)):
            radius = thickness / 2
            draw.ellipse((centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius), fill=1)
        x, y = to_x, to_y


def _draw_box(draw: ImageDraw.ImageDraw, height: int, width: int, style: MaskStyle) -> None:
    side = min(height, width)
    rows, columns = (max(1, round(side * random_between(*style.box))) for _ in range(2))
    top, left = random_below(height - rows + 1), random_below(width - columns + 1)
    draw.rectangle((left, top, left + columns - 1, top + rows - 1), fill=1)
