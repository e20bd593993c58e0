"""Contact sheet of a set: samples as the autoencoder decodes them, with their captions and loss masks."""

from __future__ import annotations

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.evaluation.protocol import spread
from ldm.images.grid import to_images
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CAPTION, LATENT, LOSS_MASK

_SIDE, _GAP, _COLUMNS = 192, 12, 6  # pixels: longer side of an image, distance between images
_TEXT, _LINE = 13, 16  # pixels: font size and line height
_LINES, _LETTERS = 3, 29  # lines per caption, characters per line
_INK = "#333333"
_OUTSIDE, _TINT = (200, 0, 60), 150  # colour over the black part of a loss mask, and its opacity of 255


@torch.no_grad()
def contact_sheet(model: LatentDiffusion, dataset: ShardDataset, count: int) -> Image.Image:
    """Draw a sheet of at most `count` samples, spread over the set and decoded from their most likely latents.

    The parts outside of a loss mask are tinted red.

    Raises:
        UserError: the shapes of the set's latents do not fit the model.
    """
    for shape in dataset.shapes[LATENT]:
        model.check_batch_shapes({model.first_stage_key: shape})
    font = ImageFont.load_default(_TEXT)
    numbers = spread(len(dataset), count)
    columns = min(_COLUMNS, len(numbers))
    width, height = _SIDE + _GAP, _SIDE + _GAP + _LINES * _LINE
    sheet = Image.new("RGB", (_GAP + columns * width, _GAP + -(-len(numbers) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, number in enumerate(numbers.tolist()):
        sample = dataset[number]
        row, column = divmod(place, columns)
        left, top = _GAP + column * width, _GAP + row * height
        image = _tinted(_decode(model, torch.from_numpy(sample[LATENT])), sample.get(LOSS_MASK))
        sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
        lines = textwrap.wrap(sample[CAPTION], _LETTERS, max_lines=_LINES, placeholder=" …")
        for line, text in enumerate(lines or ["(no caption)"]):
            draw.text((left, top + _SIDE + 2 + line * _LINE), text, _INK, font)
    return sheet


def _tinted(image: Image.Image, mask: np.ndarray | None) -> Image.Image:
    """Return `image` with a red tint where the loss mask (1, h, w) is 0."""
    if mask is None:
        return image
    opacity = Image.fromarray(np.uint8(_TINT * (1 - mask[0].astype(np.float32))))
    outside = opacity.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, _OUTSIDE), image, outside)


def _decode(model: LatentDiffusion, stored: torch.Tensor) -> Image.Image:
    """Decode the parameters (2C, h, w) of a posterior, or a latent (C, h, w), and resize the image for the sheet."""
    latent = stored[None, : model.channels].float().to(model.device)  # the mean of a posterior
    [image] = to_images(model.decode_first_stage(model.scale_factor * latent))
    scale = _SIDE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)
