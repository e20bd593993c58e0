"""Images for the image logger: inputs, reconstructions, samples and denoising rows."""

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


class LoggedModel(Denoiser, Protocol):
    """Parts of a diffusion model that `log_images` uses."""

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
    """Return the first `n` samples of a batch, a batch entry or a conditioning."""
    if isinstance(value, Mapping):
        return {key: first(entry, n) for key, entry in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [entry[:n] for entry in value]
    return value[:n] if isinstance(value, (Tensor, list, tuple)) else value


def _as_images(x: Tensor) -> Tensor:
    """Return `x` (N, C, H, W) with three channels, repeated or cut."""
    return x[:, :1].expand(-1, 3, -1, -1) if x.shape[1] < 3 else x[:, :3]


@torch.no_grad()
def log_images(
    model: LoggedModel,
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
    """Return images (≤ N, 3, H, W) of one batch by name, about [-1, 1].

    Args:
        n_row: samples in the denoising and diffusion rows. Each sample has one row of steps.
        sample: add `samples`, sampled by DDIM under the conditioning of the batch.
        unconditional_guidance_scale: scale of guidance for `samples_cfg…`. It needs a cond stage that encodes text.
        use_ema_scope: sample with the averaged weights, if there are any.
        inpaint, quantize_denoised, plot_progressive_rows: accepted for old configs and ignored.
        split: ignored.
    """
    del split, inpaint, quantize_denoised, plot_progressive_rows
    latent, cond, inputs = model.encode_with_images(first(batch, N))
    images = {"inputs": inputs, "reconstruction": model.to_images(latent)}
    if plot_diffusion_rows:
        images["diffusion_row"] = _diffusion_row(model, latent[:n_row])
    if sample:
        steps = min(ddim_steps, model.num_timesteps)

        def sampled(**kwargs: Any) -> tuple[Tensor, dict[str, list[Tensor]]] | None:
            with model.ema_scope() if use_ema_scope else nullcontext(), _warn_if_not_finite():
                shape, count = latent.shape[1:], latent.shape[0]
                options = {"eta": ddim_eta, "verbose": False, "log_every_t": max(steps // 5, 1)}
                return DDIMSampler(model).sample(steps, count, shape, cond, **options, **kwargs)

        images |= _samples(model, sampled(), n_row if plot_denoise_rows else 0)
        if unconditional_guidance_scale != 1.0 and model.reads_captions:
            label = unconditional_guidance_label
            label = label if isinstance(label, str) else label[0]  # old configs have a list with one entry
            uncond = model.get_unconditional_conditioning(latent.shape[0], label, cond)
            scale = unconditional_guidance_scale
            guided = sampled(unconditional_guidance_scale=scale, unconditional_conditioning=uncond)
            images |= _samples(model, guided, 0, f"samples_cfg_scale_{scale:.2f}")
    return {key: _as_images(value) for key, value in images.items()}


def _samples(
    model: LoggedModel, sampled: tuple[Tensor, dict[str, list[Tensor]]] | None, n_row: int, name: str = "samples"
) -> dict[str, Tensor]:
    """Return the images of `sampled` under `name`, and for `n_row` of them the row of predicted x₀."""
    if sampled is None:
        return {}
    images = {name: model.to_images(sampled[0])}
    if n_row:
        steps = torch.stack(sampled[1]["pred_x0"][1:], dim=1)[:n_row]  # (n, steps, C, h, w)
        images["denoise_row"] = model.to_images(steps.flatten(0, 1))
    return images


@contextmanager
def _warn_if_not_finite() -> Iterator[None]:
    """Turn `NotFiniteError` into a warning, so that training continues and other processes do not wait."""
    try:
        yield
    except NotFiniteError as error:
        logger.warning("no samples are logged: %s", error)


def _diffusion_row(model: LoggedModel, latent: Tensor) -> Tensor:
    """Return the images of latents (n, C, h, w) at increasing noise, sample by sample."""
    steps = range(0, model.num_timesteps, model.log_every_t)
    rows = [
        model.q_sample(latent, torch.full((latent.shape[0],), t, device=latent.device, dtype=torch.long)) for t in steps
    ]
    return model.to_images(torch.stack(rows, dim=1).flatten(0, 1))
