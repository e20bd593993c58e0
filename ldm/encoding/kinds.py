"""Kinds of samples: the stored arrays of an image, by the kind of model that trains on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.loader import seeded
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.read import FittedImage, read_fitted
from ldm.images.buckets import Size
from ldm.images.find import ImageItem
from ldm.images.masks import random_mask, style_of
from ldm.models.diffusion import ddpm_edit
from ldm.models.diffusion.ddpm import LatentDepth2ImageDiffusion, LatentInpaintDiffusion
from ldm.shards.sample import DEPTH, EDIT, LATENT, MASK, MASKED_IMAGE, blank_key, numbered
from ldm.util import UserError, check_number, get_obj_from_str, refuse_if

MASKS = 4  # default number of masks per sample
_STYLE = "512train"
_PROPORTIONS = 0.02  # tolerance for the aspect ratios of the two images in a pair


class ImageSamples:
    """Samples with the posterior of an image, for models conditioned on its caption."""

    members: tuple[str, ...] = (LATENT,)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the samples, as entries of the index."""
        return {}

    def read(self, number: int, item: ImageItem, sizes: Sequence[Size]) -> FittedImage:
        """Return image `number` of the input, fitted to the nearest of `sizes`. Called in worker processes.

        Raises:
            UserError: the image cannot be read.
        """
        return read_fitted(number, item, sizes)

    def encode(self, encoder: SampleEncoder, images: Sequence[FittedImage], flip: bool) -> dict[str, Tensor]:
        """Return the arrays (B, ...) by member for images of one size, or with `flip` for their mirror images."""
        return {LATENT: encoder.images(_stacked([image.pixels for image in images], flip))}

    def blanks(self, encoder: SampleEncoder, sizes: Iterable[Size]) -> dict[str, np.ndarray]:
        """Return the arrays of completely masked images, by the key of `null_path`, for samples of these `sizes`."""
        return {}


class MaskedSamples(ImageSamples):
    """Samples with `count` masks and the posteriors of the masked images, for inpainting.

    Masks are boxes and strokes, seeded by the number of the image. A mirror image has different masks.
    """

    members = (LATENT, MASK, MASKED_IMAGE)

    def __init__(self, count: int, flip: bool) -> None:
        self.count = count
        self.views = 2 if flip else 1

    @property
    def settings(self) -> dict[str, Any]:
        return {"masks": self.count}

    def read(self, number: int, item: ImageItem, sizes: Sequence[Size]) -> FittedImage:
        image = super().read(number, item, sizes)
        masks = np.empty((self.views * self.count, *image.size), np.uint8)
        for place in range(len(masks)):
            with seeded(0, number, place):
                masks[place] = random_mask(*image.size, style_of(_STYLE))[..., 0].numpy()
        return replace(image, others={MASK: masks})

    def encode(self, encoder: SampleEncoder, images: Sequence[FittedImage], flip: bool) -> dict[str, Tensor]:
        pixels = _stacked([image.pixels for image in images], flip)
        first = self.count if flip else 0
        arrays = {LATENT: encoder.images(pixels)}
        for number in range(self.count):
            masks = _stacked([image.others[MASK][first + number, None] for image in images])  # B 1 H W
            arrays[numbered(MASK, number)] = encoder.masks(masks)
            arrays[numbered(MASKED_IMAGE, number)] = encoder.images(pixels, masks)
        return arrays

    def blanks(self, encoder: SampleEncoder, sizes: Iterable[Size]) -> dict[str, np.ndarray]:
        found = {}
        for size in sizes:
            nothing = torch.zeros(1, 3, *size, dtype=torch.uint8)
            encoded = encoder.images(nothing, torch.ones_like(nothing[:, :1])).cpu().numpy()[0]
            found[blank_key(*encoded.shape[1:])] = encoded
        return found


class EditSamples(ImageSamples):
    """Samples with the posterior of an edited image and the latent of the image before, for InstructPix2Pix."""

    members = (LATENT, EDIT)

    def read(self, number: int, item: ImageItem, sizes: Sequence[Size]) -> FittedImage:
        if item.edited is None:
            raise UserError(f"{item.name}: {item.error or 'has no edited image'}")
        after = read_fitted(number, item.edited, sizes)
        before = read_fitted(number, item, [after.size])
        difference = abs(before.height * after.width / (before.width * after.height) - 1)
        if difference > _PROPORTIONS:
            shapes = [f"{image.width}x{image.height}" for image in (before, after)]
            raise UserError(
                f"{item.name}: has {shapes[0]} pixels, but {shapes[1]} after the edit; the aspect ratios must be equal"
            )
        return replace(after, item=item, others={EDIT: before.pixels})

    def encode(self, encoder: SampleEncoder, images: Sequence[FittedImage], flip: bool) -> dict[str, Tensor]:
        before = encoder.images(_stacked([image.others[EDIT] for image in images], flip))
        mode = before[:, : encoder.model.channels]  # the mean of a posterior
        return {**super().encode(encoder, images, flip), EDIT: mode}


class DepthSamples(ImageSamples):
    """Samples with the depth that the model's network estimates for each image."""

    members = (LATENT, DEPTH)

    def encode(self, encoder: SampleEncoder, images: Sequence[FittedImage], flip: bool) -> dict[str, Tensor]:
        pixels = _stacked([image.pixels for image in images], flip)
        return {LATENT: encoder.images(pixels), DEPTH: encoder.depths(pixels)}


def samples_for(model: Any, masks: int | None = None, flip: bool = False) -> ImageSamples:
    """Return the kind of samples for `model`. `masks` is the number per sample for an inpainting model.

    Raises:
        UserError: no kind of sample has the conditioning of `model`, or `masks` is given for another kind of model.
    """
    if isinstance(model, LatentInpaintDiffusion):
        check_number("--masks", masks, least=1, optional=True)
        return MaskedSamples(masks or MASKS, flip)
    refuse_if(masks is not None, f"--masks {masks}: this is not an inpainting model; leave it out")
    if isinstance(model, ddpm_edit.LatentDiffusion):
        return EditSamples()
    if isinstance(model, LatentDepth2ImageDiffusion):
        refuse_if(
            model.depth_model is None,
            "the model has no depth network, which estimates the depth of images; name a whole release, such as "
            "512-depth-ema.ckpt, and no config without depth_stage_config",
        )
        return DepthSamples()
    if getattr(model.model, "takes_maps", False):
        raise UserError(
            f"the config's model, {type(model).__name__}, is conditioned on {', '.join(model.concat_keys)}, which "
            "shards do not hold; train it straight from images"
        )
    return ImageSamples()


def takes_pairs(config: Mapping[str, Any]) -> bool:
    """Return True if the model of `config` trains on pairs of images."""
    target = (config.get("model") or {}).get("target")
    kind = get_obj_from_str(target) if isinstance(target, str) else None
    return isinstance(kind, type) and issubclass(kind, ddpm_edit.LatentDiffusion)


def _stacked(arrays: Sequence[np.ndarray], flip: bool = False) -> Tensor:
    """Stack arrays to one tensor, mirrored if `flip`."""
    stacked = torch.stack([torch.from_numpy(array) for array in arrays])
    return stacked.flip(-1) if flip else stacked
