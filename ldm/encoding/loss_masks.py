"""Samples with a loss mask at the latent's size, beside those of another kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.kinds import EditSamples, ImageSamples, MaskedSamples
from ldm.encoding.read import FittedImage
from ldm.images.buckets import Size
from ldm.images.find import ImageItem
from ldm.images.mask_files import read_loss_masks
from ldm.shards.sample import LATENT, LOSS_MASK
from ldm.util import refuse_if


class LossMaskSamples(ImageSamples):
    """Samples of the kind `inner` with a loss mask, cropped and mirrored like the image. Without one, it is all 1.

    Args:
        factor: pixels per side of a latent's cell.

    Raises:
        UserError: `inner` are samples for inpainting, or pairs of images.
    """

    def __init__(self, inner: ImageSamples, factor: int) -> None:
        refuse_if(
            isinstance(inner, MaskedSamples),
            "--loss-masks: not for inpainting, which trains with masks of its own; leave it out",
        )
        refuse_if(
            isinstance(inner, EditSamples),
            "--loss-masks: not for pairs of images, which train on the whole edited image; leave it out",
        )
        self.inner, self.factor = inner, factor
        self.members = (*inner.members, LOSS_MASK)

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.inner.settings, "loss_masks": True}

    def read(self, number: int, item: ImageItem, sizes: Sequence[Size]) -> FittedImage:
        image = self.inner.read(number, item, sizes)
        shape = image.size[0] // self.factor, image.size[1] // self.factor
        crops = [view.crop for view in image.views]
        masks = read_loss_masks(item, crops, (image.height, image.width), shape)  # K 1 h w
        return image if masks is None else replace(image, others={**image.others, LOSS_MASK: masks})

    def encode(self, encoder: SampleEncoder, images: Sequence[FittedImage], flip: bool) -> dict[str, Tensor]:
        arrays = self.inner.encode(encoder, images, flip)
        whole = np.ones((len(images[0].views), 1, *arrays[LATENT].shape[-2:]), np.float16)
        masks = torch.from_numpy(np.stack([image.others.get(LOSS_MASK, whole) for image in images]))  # B K 1 h w
        masks = masks.flip(-1) if flip else masks
        return {**arrays, LOSS_MASK: masks if images[0].variants else masks[:, 0]}

    def blanks(self, encoder: SampleEncoder, sizes: Iterable[Size]) -> dict[str, np.ndarray]:
        return self.inner.blanks(encoder, sizes)
