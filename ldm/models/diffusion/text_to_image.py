"""Captions to pictures with a latent diffusion model and any of its samplers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.latent import LatentDiffusion, check_reads_captions
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import Sampler
from ldm.util import UserError

logger = logging.getLogger(__name__)

SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}


class Request(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int


def latent_shape(model: LatentDiffusion, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(C, h, w) of the latent of a picture of that size in pixels; None is the size that the model was made for.

    Raises:
        UserError: a size that the first stage and the UNet cannot halve evenly.
    """
    pixels = model.first_stage_model.downsampling
    multiple = pixels * model.model.diffusion_model.downsampling
    sizes = []
    for name, size in (("H", height), ("W", width)):
        size = pixels * model.image_size if size is None else size
        if size < multiple or size % multiple:
            raise UserError(f"--{name} {size}: this model makes pictures in multiples of {multiple} pixels")
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
    """Scaled latents (C, h, w), float32 on the model's device, in the order of `requests`.

    Drawn with the averaged weights, if the model keeps any. A request's noise is drawn from its own seed, so that its
    latent does not depend on the others or on `batch_size`, but for rounding: kernels sum in another order for another
    batch, which can move a pixel of its picture by 1/255.

    Args:
        shape: (C, h, w) of the latents; see `latent_shape`.
        sampler: a key of `SAMPLERS`.
        scale: classifier-free guidance away from the empty caption; 1 for none.

    Raises:
        UserError: a model that reads no captions, a sampler that does not exist, or settings that it cannot take.
    """
    parts = (requests[start : start + batch_size] for start in range(0, len(requests), batch_size))
    for samples in draw_batches(model, parts, shape, sampler, steps, scale, eta, verbose):
        yield from samples


@torch.no_grad()
def draw_batches(
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
    empty = model.get_learned_conditioning([""]) if guided else None  # (1, 77, D)
    for part in parts:
        with model.ema_scope():
            samples, _ = drawer.sample(
                S=steps,
                batch_size=len(part),
                shape=shape,
                conditioning=model.get_learned_conditioning([request.prompt for request in part]),
                unconditional_conditioning=empty.expand(len(part), -1, -1) if guided else None,
                unconditional_guidance_scale=scale,
                eta=eta,
                generators=[torch.Generator().manual_seed(request.seed) for request in part],
                verbose=verbose,
            )
        yield samples


@torch.no_grad()
def text_to_image(
    model: LatentDiffusion, requests: Sequence[Request], shape: tuple[int, int, int], **settings: Any
) -> Iterator[Tensor]:
    """Pictures (3, H, W), about [-1, 1], float32 on the CPU, of what `draw_latents` draws with the same arguments."""
    for latent in draw_latents(model, requests, shape, **settings):
        yield model.decode_first_stage(latent[None])[0].float().cpu()  # alone: it takes more memory than sampling
