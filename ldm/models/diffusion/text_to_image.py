"""Captions to images with a latent diffusion model and any of its samplers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import check_reads_captions
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import Conditioning, concatenate
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import NotFiniteError, Sampler
from ldm.util import UserError

logger = logging.getLogger(__name__)

SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}


class Request(NamedTuple):
    """One image to make."""

    prompt: str
    seed: int
    negative_prompt: str = ""  # the caption that guidance moves away from

    def described(self) -> dict[str, Any]:
        """Return the fields by name, without an empty negative prompt."""
        return {name: value for name, value in self._asdict().items() if name != "negative_prompt" or value}


def latent_shape(model: LatentDiffusion, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Return (C, h, w) of the latent of an image of that size in pixels; None is the size that the model was made for.

    Raises:
        UserError: a size that the first stage and the UNet cannot halve evenly.
    """
    pixels = model.first_stage_model.downsampling
    multiple = pixels * model.model.diffusion_model.downsampling
    sizes = []
    for name, size in (("H", height), ("W", width)):
        size = pixels * model.image_size if size is None else size
        if size < multiple or size % multiple:
            raise UserError(f"--{name} {size}: this model makes images in multiples of {multiple} pixels")
        sizes.append(size // pixels)
    return model.channels, *sizes


@torch.no_grad()
def draw_latents(
    model: LatentDiffusion,
    requests: Sequence[Request],
    shape: tuple[int, int, int],
    sampler: str = "ddim",
    steps: int = 50,
    scale: float = 7.5,
    eta: float = 0.0,
    batch_size: int = 4,
    verbose: bool = True,
) -> Iterator[Tensor]:
    """Yield scaled latents (C, h, w), float32 on the model's device, in the order of `requests`.

    The weights are the averaged ones, if the model keeps any. The noise of a request is of its own seed, so that its
    latent does not depend on the others or on `batch_size`, except for rounding: kernels sum in another order for
    another batch, which can move a pixel of the image by 1/255.

    Args:
        shape: (C, h, w) of the latents; see `latent_shape`.
        sampler: a key of `SAMPLERS`.
        scale: classifier-free guidance away from the negative prompt; 1 for none.

    Raises:
        UserError: a model that reads no captions, a sampler that does not exist, settings that it cannot take, or a
            sample that is not finite.
    """
    parts = (requests[start : start + batch_size] for start in range(0, len(requests), batch_size))
    for samples in sample_batches(model, parts, shape, sampler, steps, scale, eta, verbose):
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
) -> Iterator[Tensor]:
    """Yield the scaled latents (B, C, h, w) of each of `parts`, as `draw_latents` does of its batches."""
    check_reads_captions(model)
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r} is unknown; valid: {', '.join(SAMPLERS)}")
    drawer = SAMPLERS[sampler](model)
    drawer.make_schedule(steps, ddim_eta=eta)
    if len(drawer.timesteps) != steps:
        run, of = len(drawer.timesteps), model.num_timesteps
        logger.info("%s runs %d steps, for %d do not divide the model's %d", sampler, run, steps, of)
    guided = scale != 1.0
    negatives: dict[str, Conditioning] = {}  # by prompt; most requests share one
    for part in parts:
        with model.ema_scope(), _named(part):
            samples, _ = drawer.sample(
                S=steps,
                batch_size=len(part),
                shape=shape,
                conditioning=model.get_learned_conditioning([request.prompt for request in part]),
                unconditional_conditioning=_negative_conditioning(model, part, negatives) if guided else None,
                unconditional_guidance_scale=scale,
                eta=eta,
                generators=[torch.Generator().manual_seed(request.seed) for request in part],
                verbose=verbose,
            )
        yield samples


def _negative_conditioning(
    model: LatentDiffusion, part: Sequence[Request], known: dict[str, Conditioning]
) -> Conditioning:
    """Return the conditioning of the negative prompts of `part`; each is encoded once, and added to `known`."""
    for prompt in dict.fromkeys(request.negative_prompt for request in part):
        if prompt not in known:
            known[prompt] = model.get_unconditional_conditioning(1, prompt)
    return concatenate(*(known[request.negative_prompt] for request in part))


@contextmanager
def _named(part: Sequence[Request]) -> Iterator[None]:
    """Within it, a sample that is not finite is named by its prompt and seed."""
    try:
        yield
    except NotFiniteError as error:
        request = part[error.row or 0]
        raise NotFiniteError(f"{request.prompt!r}, seed {request.seed}: {error}", error.row) from error


@torch.no_grad()
def text_to_image(
    model: LatentDiffusion, requests: Sequence[Request], shape: tuple[int, int, int], **settings: Any
) -> Iterator[Tensor]:
    """Yield images (3, H, W), about [-1, 1], float32 on the CPU, of what `draw_latents` gives for the same arguments.

    Raises:
        UserError: see `draw_latents`; or an image that is not finite.
    """
    for latent in draw_latents(model, requests, shape, **settings):
        image = model.decode_first_stage(latent[None])[0].float().cpu()  # alone: it takes more memory than sampling
        if not image.isfinite().all():
            raise NotFiniteError(
                "the first stage decodes a finite latent to NaN or infinities; check its weights, or use "
                "--precision fp32 or bf16"
            )
        yield image
