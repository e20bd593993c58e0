"""Sampling of images from prompts, with a latent diffusion model and any sampler."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.diffusion.inputs import NO_INPUTS, Inputs, encode_inputs, image_scale_of
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.prompts import PromptConditioning, image_sizes
from ldm.models.diffusion.samplers import SAMPLERS, sampler_class
from ldm.models.diffusion.sampling import NotFiniteError
from ldm.util import check_choice, refuse_if

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """Request for one image."""

    prompt: str
    seed: int
    negative_prompt: str = ""  # prompt that guidance moves away from

    def described(self) -> dict[str, Any]:
        """Return the fields by name, without an empty negative prompt."""
        return {name: value for name, value in self._asdict().items() if name != "negative_prompt" or value}


def latent_shape(
    model: LatentDiffusion, height: int | None, width: int | None, options: Sequence[str] = ("--H", "--W")
) -> tuple[int, int, int]:
    """Return the latent shape (C, h, w) of an image of `height` and `width` in pixels. None is the model's image size.

    `options` name height and width in messages.

    Raises:
        UserError: a size is not a multiple of the model's total downsampling.
    """
    pixels = model.first_stage_model.downsampling
    multiple = pixels * model.model.diffusion_model.downsampling
    sizes = []
    for name, size in zip(options, (height, width), strict=True):
        size = pixels * model.image_size if size is None else size
        refuse_if(
            size < multiple or size % multiple, f"{name} {size}: must be a multiple of {multiple} pixels for this model"
        )
        sizes.append(size // pixels)
    return model.channels, *sizes


def image_size(model: LatentDiffusion, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return height and width in pixels of an image whose latent has the `shape` (C, h, w)."""
    pixels = model.first_stage_model.downsampling
    return shape[1] * pixels, shape[2] * pixels


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    requests: Sequence[Request],
    shape: tuple[int, int, int],
    sampler: str = "ddim",
    steps: int = 50,
    scale: float = 7.5,
    eta: float = 0.0,
    batch_size: int = 4,
    verbose: bool = True,
    **guided: Any,
) -> Iterator[Tensor]:
    """Yield scaled latents (C, h, w), float32 on the model's device, in the order of `requests`.

    The averaged weights are used, if there are any. The noise of a request depends only on its seed, so its latent does
    not depend on the other requests or on `batch_size`. Rounding is an exception: kernels sum in another order for
    another batch size, which can change a pixel by 1/255.

    Args:
        shape: (C, h, w) of the latents; see `latent_shape`.
        sampler: key of `SAMPLERS`.
        scale: scale of classifier-free guidance away from the negative prompt; 1 for no guidance.
        guided: further arguments of `sample_batches`.

    Raises:
        UserError: see `sample_batches`.
    """
    parts = (requests[start : start + batch_size] for start in range(0, len(requests), batch_size))
    for samples in sample_batches(model, parts, shape, sampler, steps, scale, eta, verbose, **guided):
        yield from samples


@torch.no_grad()
def sample_batches(
    model: LatentDiffusion,
    parts: Iterable[Sequence[Request]],
    shape: tuple[int, int, int],
    sampler: str,
    steps: int,
    scale: float,
    eta: float,
    verbose: bool,
    inputs: Inputs = NO_INPUTS,
    spacing: str | None = None,
    guidance_rescale: float = 0.0,
    image_scale: float | None = None,
    captions: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Iterator[Tensor]:
    """Yield the scaled latents (B, C, h, w) of each of `parts`; see `sample_latents`.

    Args:
        inputs: images and other inputs besides prompts.
        spacing: see `steps_at`; `Sampler.own_spacing` by default.
        guidance_rescale: share of `rescaled`.
        image_scale: guidance towards the image of a model that edits images; see `image_scale_of`.
        captions: encodings of the prompts; see `PromptConditioning`.

    Raises:
        UserError: the model does not read captions, needs other inputs, or cannot take a setting; the sampler is
            unknown; or a sample is not finite.
    """
    check_choice("sampler", sampler, tuple(SAMPLERS))
    solver = sampler_class(sampler)(model)
    solver.make_schedule(steps, spacing, eta)
    if verbose and len(solver.timesteps) != steps:
        run, total = len(solver.timesteps), model.num_timesteps
        logger.info("%s runs %d steps, because %d does not divide the model's %d timesteps", sampler, run, steps, total)
    image_scale = image_scale_of(model, image_scale)
    encoded = encode_inputs(model, inputs, shape)
    sizes = image_sizes(model, inputs.sizes, *image_size(model, shape))
    conditioning = PromptConditioning(model, sizes, encoded.maps, image_scale is not None, captions)
    is_guided = scale != 1.0 or image_scale not in (None, 1.0)
    for part in parts:
        with model.ema_scope(), _name_request(part):
            negatives = [request.negative_prompt for request in part]
            samples, _ = solver.sample(
                S=steps,
                batch_size=len(part),
                shape=shape,
                conditioning=conditioning.of([request.prompt for request in part]),
                unconditional_conditioning=conditioning.of_negatives(negatives) if is_guided else None,
                unconditional_guidance_scale=scale,
                image_guidance_scale=image_scale,
                guidance_rescale=guidance_rescale,
                eta=eta,
                spacing=spacing,
                mask=encoded.keep,
                x0=encoded.kept,
                init=encoded.init,
                strength=inputs.strength,
                generators=[torch.Generator().manual_seed(request.seed) for request in part],
                verbose=verbose,
            )
        yield encoded.with_kept(samples)


@contextmanager
def _name_request(part: Sequence[Request]) -> Iterator[None]:
    """Add prompt and seed of the request to a `NotFiniteError`."""
    try:
        yield
    except NotFiniteError as error:
        request = part[error.row or 0]
        raise NotFiniteError(f"{request.prompt!r}, seed {request.seed}: {error}", error.row) from error


@torch.no_grad()
def text_to_image(
    model: LatentDiffusion,
    requests: Sequence[Request],
    shape: tuple[int, int, int],
    inputs: Inputs = NO_INPUTS,
    **settings: Any,
) -> Iterator[Tensor]:
    """Yield images (3, H, W), about [-1, 1], float32 on the CPU, decoded from the result of `sample_latents`.

    Where a mask keeps the pixels of an image, they are those of the image itself.

    Raises:
        UserError: as `sample_latents`, or an image is not finite.
    """
    for latent in sample_latents(model, requests, shape, inputs=inputs, **settings):
        image = model.decode_first_stage(latent[None])[0].float().cpu()  # one by one, to save memory
        if not image.isfinite().all():
            raise NotFiniteError(
                "the autoencoder decodes a finite latent to NaN or infinities; check its weights, or use "
                "--precision fp32 or bf16"
            )
        yield inputs.pasted(image)
