"""Inputs of sampling besides prompts: images to start from, to repaint or to edit, a depth map, and image sizes.

B: batch. H, W: height and width of the sampled image. C, h, w: channels, height and width of its latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion import ddpm_edit
from ldm.models.diffusion.concat import (
    LatentDepth2ImageDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    for_depth_network,
)
from ldm.models.diffusion.image_embedding import ImageEmbeddingConditionedLatentDiffusion
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, refuse_if

IMAGE_SCALE = 1.5  # default guidance towards the image of InstructPix2Pix (arXiv:2211.09800, section 3.3)


@dataclass(frozen=True)
class Inputs:
    """Inputs of sampling besides prompts, the same for all samples.

    Images (3, H, W) are in [-1, 1].

    Args:
        init, strength: image to start from, and the share of steps that run (image to image, arXiv:2108.01073).
        image: image to repaint, to edit, or to estimate the depth of.
        mask: (1, H, W), 1 where the image is repainted, 0 where it is kept.
        depth: (1, H, W), larger for nearer.
        sizes: sizes that condition a model like SDXL, by name; see `image_sizes` for those that are not given.
    """

    init: Tensor | None = None
    strength: float = 1.0
    image: Tensor | None = None
    mask: Tensor | None = None
    depth: Tensor | None = None
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def pasted(self, sample: Tensor) -> Tensor:
        """Return a sampled image (3, H, W) with the pixels of `image` where the mask is 0."""
        if self.mask is None:
            return sample
        return self.mask * sample.clamp(-1, 1) + (1 - self.mask) * self.image


NO_INPUTS = Inputs()


class EncodedInputs(NamedTuple):
    """Inputs in the latent space, each for a batch of one."""

    maps: list[Tensor]  # (1, C', h, w), concatenated to the UNet's input
    init: Tensor | None = None  # (1, C, h, w)
    kept: Tensor | None = None  # (1, C, h, w): the latents that the sample follows where `keep` is 1
    keep: Tensor | None = None  # (1, 1, h, w)

    def with_kept(self, samples: Tensor) -> Tensor:
        """Return `samples` (B, C, h, w) with the kept latents themselves, without the noise of the last step."""
        return samples if self.keep is None else self.keep * self.kept + (1 - self.keep) * samples


def encode_inputs(model: LatentDiffusion, inputs: Inputs, shape: tuple[int, int, int]) -> EncodedInputs:
    """Return `inputs` in the latent space of `model`, for latents of `shape` (C, h, w).

    Latents are the modes of their posteriors, so that they do not depend on a seed.

    Raises:
        UserError: the model needs an input that is missing, or cannot take one that is given; or the first stage
            encodes an image to NaN or infinities.
    """
    maps = _maps_of(model)
    _check(model, inputs, maps)
    encoded = EncodedInputs(
        [] if maps is None else maps(model, inputs, shape),
        None if inputs.init is None else model.scale_factor * _latent(model, inputs.init),
    )
    if inputs.mask is None or isinstance(model, LatentInpaintDiffusion):
        return encoded
    keep = 1 - _repainted_cells(model, inputs.mask, shape)
    return encoded._replace(kept=model.scale_factor * _latent(model, inputs.image), keep=keep)


def image_scale_of(model: LatentDiffusion, given: float | None) -> float | None:
    """Return the scale of guidance towards the image, `given` or the default. It is None if the model edits no images.

    Raises:
        UserError: a scale is given, but the model edits no images.
    """
    if isinstance(model, ddpm_edit.LatentDiffusion):
        return IMAGE_SCALE if given is None else given
    refuse_if(given is not None, f"--image-scale {given}: this model does not edit images; leave it out")
    return None


# Makes the maps (1, C', h, w) of a model from its inputs and the latent's shape.
Maps = Callable[[LatentDiffusion, Inputs, tuple[int, int, int]], list[Tensor]]


def _maps_of(model: LatentDiffusion) -> Maps | None:
    return next((maps for kind, maps in _MAPS.items() if isinstance(model, kind)), None)


def _check(model: LatentDiffusion, inputs: Inputs, maps: Maps | None) -> None:
    repaints, edits = isinstance(model, LatentInpaintDiffusion), isinstance(model, ddpm_edit.LatentDiffusion)
    uses_depth = isinstance(model, LatentDepth2ImageDiffusion)
    has_image = inputs.image is not None
    refuse_if(
        isinstance(model, LatentUpscaleDiffusion),
        "this is an upscaler, which txt2img does not sample from; name a model that makes images from prompts",
    )
    refuse_if(
        isinstance(model, ImageEmbeddingConditionedLatentDiffusion),
        "this model makes variations of images, and txt2img cannot sample from it; name a model that makes images "
        "from prompts",
    )
    refuse_if(
        model.model.takes_maps and maps is None,
        f"this model needs {', '.join(model.concat_keys) or 'maps'} beside prompts, which txt2img cannot give",
    )
    refuse_if(inputs.mask is not None and not has_image, "--mask: give --image too, the image to repaint")
    refuse_if(repaints and inputs.mask is None, "this model repaints a part of an image; give --image and --mask")
    refuse_if(edits and not has_image, "this model edits an image; give --image")
    refuse_if(
        has_image and inputs.mask is None and maps is None,
        "--image: this model repaints only under a mask; give --mask too, or start from the image with --init-image",
    )
    refuse_if(inputs.depth is not None and not uses_depth, "--depth: this model does not use a depth map; leave it out")


def _latent(model: LatentDiffusion, image: Tensor) -> Tensor:
    """Return the unscaled latent (1, C, h, w), the mode of the posterior, of an image (3, H, W)."""
    encoded = model.encode_first_stage(image[None].to(model.device))
    latent = (encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded).float()
    if not latent.isfinite().all():
        raise UserError(
            "the autoencoder encodes an image to NaN or infinities; check its weights, or use --precision fp32 or bf16"
        )
    return latent


def _repainted_cells(model: LatentDiffusion, mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the mask (1, 1, h, w) of the latent's cells that hold a pixel to repaint."""
    repainted = (mask >= 0.5).float()[None].to(model.device)
    return F.adaptive_max_pool2d(repainted, shape[1:])


def _inpainting_maps(model: LatentInpaintDiffusion, inputs: Inputs, shape: tuple[int, int, int]) -> list[Tensor]:
    """Return the mask and the latent of the image without its masked pixels, which are 0 as in training."""
    masked = _latent(model, inputs.image * (inputs.mask < 0.5))
    cells = _repainted_cells(model, inputs.mask, shape)
    stored = {key: masked if key == model.masked_image_key else cells for key in model.concat_keys}
    return model.concatenated({model.first_stage_key: masked, **stored})


def _edit_maps(model: ddpm_edit.LatentDiffusion, inputs: Inputs, shape: tuple[int, int, int]) -> list[Tensor]:
    return model.concatenated({model.concat_keys[0]: _latent(model, inputs.image)})


def _depth_maps(model: LatentDepth2ImageDiffusion, inputs: Inputs, shape: tuple[int, int, int]) -> list[Tensor]:
    """Return the depth map: the given one, or the model's estimate for the image, or else for the start image."""
    source = inputs.image if inputs.image is not None else inputs.init
    if inputs.depth is not None:
        entry = inputs.depth[None]
    elif source is None or model.depth_model is None:
        raise UserError(
            "this model needs a depth map; give --depth, a .npy or an image where nearer is lighter"
            + (", or --image, whose depth is estimated" if model.depth_model is not None else "")
        )
    else:
        entry = for_depth_network(source[None])
    latent = torch.empty(1, *shape, device=model.device)  # only its size is used
    return model.concatenated({model.first_stage_key: latent, model.concat_keys[0]: entry.to(model.device)})


_MAPS: Mapping[type[LatentDiffusion], Maps] = {
    LatentInpaintDiffusion: _inpainting_maps,
    LatentDepth2ImageDiffusion: _depth_maps,
    ddpm_edit.LatentDiffusion: _edit_maps,
}
