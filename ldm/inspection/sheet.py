"""Samples of a set as the autoencoder decodes them, with their captions: what the model will see."""

from __future__ import annotations

import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.evaluation.protocol import spread
from ldm.images.grid import to_images
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CAPTION, LATENT

_SIDE, _GAP, _COLUMNS = 192, 12, 6  # pixels of an image's longer side, and between images
_TEXT, _LINE, _LINES, _LETTERS = 13, 16, 3, 29  # pixels of a letter and a line; lines of a caption, letters of a line
_INK = "#333333"


@torch.no_grad()
def contact_sheet(model: LatentDiffusion, dataset: ShardDataset, count: int) -> Image.Image:
    """At most `count` samples, spread over the set, decoded from the most likely latent.

    Raises:
        UserError: the set's latents are not the model's.
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
        image = _decode(model, torch.from_numpy(sample[LATENT]))
        sheet.paste(image, (left + (_SIDE - image.width) // 2, top + (_SIDE - image.height) // 2))
        lines = textwrap.wrap(sample[CAPTION], _LETTERS, max_lines=_LINES, placeholder=" …")
        for line, text in enumerate(lines or ["(no caption)"]):
            draw.text((left, top + _SIDE + 2 + line * _LINE), text, _INK, font)
    return sheet


def _decode(model: LatentDiffusion, stored: torch.Tensor) -> Image.Image:
    """The image of a posterior's parameters (2C, h, w), or of a latent (C, h, w), at the sheet's size."""
    latent = stored[None, : model.channels].float().to(model.device)  # of a posterior, the mean
    [image] = to_images(model.decode_first_stage(model.scale_factor * latent))
    scale = _SIDE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)
