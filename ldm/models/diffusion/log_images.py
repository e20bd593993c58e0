"""The images that show the progress of training: inputs, reconstructions, samples and a denoising row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import Conditioning, Denoiser
from ldm.models.diffusion.sampling import NotFiniteError

logger = logging.getLogger(__name__)


class Shown(Denoiser, Protocol):
    """The answers of a model about what it trains on."""

    log_every_t: int
    reads_captions: bool

    def encode_with_images(self, batch: Mapping[str, Any]) -> tuple[Tensor, Conditioning, Tensor]: ...

    def to_images(self, x: Tensor) -> Tensor: ...

    def q_sample(self, x_start: Tensor, t: Tensor) -> Tensor: ...

    def ema_scope(self) -> AbstractContextManager[None]: ...

    def get_unconditional_conditioning(
        self, batch_size: int, null_label: str | Sequence[str] = "", cond: Conditioning = None
    ) -> Conditioning: ...


def first(value: Any, n: int) -> Any:
    """Return the first `n` samples of a batch entry, or of a whole batch or conditioning."""
    if isinstance(value, Mapping):
        return {key: first(entry, n) for key, entry in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [entry[:n] for entry in value]
    return value[:n] if isinstance(value, (Tensor, list, tuple)) else value


def _as_images(x: Tensor) -> Tensor:
    """Return `x` (N, C, H, W) with the three channels of an image."""
    return x[:, :1].expand(-1, 3, -1, -1) if x.shape[1] < 3 else x[:, :3]


@torch.no_grad()
def log_images(
    model: Shown,
    batch: Mapping[str, Any],
    N: int = 8,
    n_row: int = 4,
    sample: bool = True,
    ddim_steps: int = 50,
    ddim_eta: float = 0.0,
    plot_denoise_rows: bool = True,
    plot_diffusion_rows: bool = False,
    unconditional_guidance_scale: float = 1.0,
    unconditional_guidance_label: str | Sequence[str] = "",
    use_ema_scope: bool = True,
    inpaint: bool = False,
    quantize_denoised: bool = False,
    plot_progressive_rows: bool = False,
    split: str = "train",
) -> dict[str, Tensor]:
    """Return named images (≤ N, 3, H, W) of one batch, about [-1, 1].

    Args:
        n_row: samples in the denoising and diffusion rows, each a row of steps.
        sample: make `samples` with DDIM, under the batch's conditioning and the averaged weights.
        unconditional_guidance_scale: guidance of `samples_cfg…`; needs a cond stage that encodes text.
        use_ema_scope: sample with the averaged weights, if there are any.
        inpaint, quantize_denoised, plot_progressive_rows: taken from old configs; these images are not made.
        split: the data that the batch is from; unused.
    """
    del split, inpaint, quantize_denoised, plot_progressive_rows
    ddim_steps = min(ddim_steps, model.num_timesteps)
    batch = first(batch, N)
    latent, cond, inputs = model.encode_with_images(batch)
    images = {"inputs": inputs, "reconstruction": model.to_images(latent)}
    if plot_diffusion_rows:
        images["diffusion_row"] = _diffusion_row(model, latent[:n_row])
    if not sample:
        return {key: _as_images(value) for key, value in images.items()}

    def draw(**kwargs: Any) -> tuple[Tensor, dict[str, list[Tensor]]] | None:
        shape, count = latent.shape[1:], latent.shape[0]
        with model.ema_scope() if use_ema_scope else nullcontext(), _told():
            return DDIMSampler(model).sample(
                ddim_steps,
                count,
                shape,
                cond,
                eta=ddim_eta,
                verbose=False,
                log_every_t=max(ddim_steps // 5, 1),
                **kwargs,
            )

    sampled = draw()
    if sampled:
        images["samples"] = model.to_images(sampled[0])
    if sampled and plot_denoise_rows:
        steps = torch.stack(sampled[1]["pred_x0"][1:], dim=1)[:n_row]  # (n, steps, C, h, w)
        images["denoise_row"] = model.to_images(steps.flatten(0, 1))
    if unconditional_guidance_scale != 1.0 and model.reads_captions:
        label = unconditional_guidance_label
        label = label if isinstance(label, str) else label[0]  # old configs give a list of one
        uncond = model.get_unconditional_conditioning(latent.shape[0], label, cond)
        guided = draw(unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=uncond)
        if guided:
            images[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = model.to_images(guided[0])
    return {key: _as_images(value) for key, value in images.items()}


@contextmanager
def _told() -> Iterator[None]:
    """Within it, a sample that is not finite is a warning: training goes on, and other processes wait for nothing."""
    try:
        yield
    except NotFiniteError as error:
        logger.warning("No samples are shown. %s", error)


def _diffusion_row(model: Shown, latent: Tensor) -> Tensor:
    """Return the latents (n, C, h, w) at rising noise, sample by sample."""
    steps = range(0, model.num_timesteps, model.log_every_t)
    rows = [
        model.q_sample(latent, torch.full((latent.shape[0],), t, device=latent.device, dtype=torch.long)) for t in steps
    ]
    return model.to_images(torch.stack(rows, dim=1).flatten(0, 1))
