"""How well a model denoises given pictures at fixed timesteps and noise, and how far its prediction is from another's.

N pictures of a set; T timesteps; a latent is (C, h, w).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.evaluation.protocol import fixed_noise
from ldm.evaluation.sets import EvaluationSet, conditioning_member
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import Conditioning
from ldm.modules.diffusionmodules.schedule import extract_into_tensor, prediction_to_eps_x0
from ldm.shards.sample import LATENT


class Record(NamedTuple):
    """What a model made of a set: `loss` (N, T) float64, and `eps`, for each picture its ε (T, C, h, w) float32."""

    loss: np.ndarray
    eps: list[Tensor]


class Comparison(NamedTuple):
    """Two models on one set, (N, T) float64 each: the losses of both, and `drift`, the move of the noise prediction.

    drift = ‖ε_tuned − ε_base‖² / ‖ε_base‖², 0 where nothing moved: the squared relative distance, so that 0.01 is a
    tenth of the prediction's length.
    """

    base: np.ndarray
    tuned: np.ndarray
    drift: np.ndarray


class _Denoised(NamedTuple):
    """A batch at one timestep: the pictures' positions, the timestep's, losses (B,) and ε (B, C, h, w) on the CPU."""

    positions: list[int]
    step: int
    loss: np.ndarray
    eps: Tensor


def record(
    model: LatentDiffusion, pictures: EvaluationSet, timesteps: Sequence[int], batch_size: int, label: str | None = None
) -> Record:
    """The losses and predictions of `model`, with its averaged weights if it keeps any. `label` shows a bar.

    The predictions take 4 bytes a value: 64 KiB a picture and timestep for Stable Diffusion at 512×512.
    """
    loss = np.empty((len(pictures), len(timesteps)))
    eps: list[list[Tensor]] = [[] for _ in range(len(pictures))]
    for part in _denoise(model, pictures, timesteps, batch_size, label):
        loss[part.positions, part.step] = part.loss
        for position, prediction in zip(part.positions, part.eps, strict=True):
            eps[position].append(prediction)
    return Record(loss, [torch.stack(steps) for steps in eps])


def compare(
    base: Record,
    model: LatentDiffusion,
    pictures: EvaluationSet,
    timesteps: Sequence[int],
    batch_size: int,
    label: str | None = None,
) -> Comparison:
    """`model` beside what `record` kept of the base on the same pictures and timesteps."""
    loss, drift = np.empty_like(base.loss), np.empty_like(base.loss)
    for part in _denoise(model, pictures, timesteps, batch_size, label):
        loss[part.positions, part.step] = part.loss
        before = torch.stack([base.eps[position][part.step] for position in part.positions]).double()
        moved = (part.eps.double() - before).square().flatten(1).sum(1)  # (B,)
        relative = moved / before.square().flatten(1).sum(1)
        drift[part.positions, part.step] = torch.where(moved == 0, 0.0, relative).numpy()
    return Comparison(base.loss, loss, drift)


@torch.no_grad()
def _denoise(
    model: LatentDiffusion, pictures: EvaluationSet, timesteps: Sequence[int], batch_size: int, label: str | None
) -> Iterator[_Denoised]:
    """All pictures at all timesteps. Nothing is random: the latent is the posterior's mode, the noise the picture's."""
    batches = list(pictures.batches(batch_size))
    with (
        model.ema_scope(),
        # `None` hides the bar where the output is no terminal.
        tqdm(total=len(batches) * len(timesteps), desc=label, leave=False, disable=None if label else True) as bar,
    ):
        for positions in batches:
            samples = [pictures[position] for position in positions]
            latent = clean_latents(model, samples)
            cond = _conditioning(model, samples)
            for step, t in enumerate(timesteps):
                keys = [sample["__key__"] for sample in samples]
                noise = torch.stack([fixed_noise(key, t, latent.shape[1:]) for key in keys]).to(latent.device)
                yield _Denoised(positions, step, *_denoise_batch(model, latent, cond, noise, t))
                bar.update()


def _denoise_batch(
    model: LatentDiffusion, latent: Tensor, cond: Conditioning, noise: Tensor, t: int
) -> tuple[np.ndarray, Tensor]:
    """Losses (B,) and ε (B, C, h, w) of clean scaled `latent` (B, C, h, w) at timestep `t`.

    The loss is the mean square error against the training target (arXiv:2006.11239, eq. 14), whatever the weights and
    the norm that training uses.
    """
    times = torch.full((len(latent),), t, device=latent.device)
    noisy = model.q_sample(latent, times, noise)
    output = model.apply_model(noisy, times, cond).float()
    error = (output - model.training_target(latent, noise, times)).square().flatten(1).mean(1)
    alpha_bar = extract_into_tensor(model.alphas_cumprod, times, noisy.shape)
    eps, _ = prediction_to_eps_x0(output, noisy, alpha_bar, model.parameterization)
    return error.double().cpu().numpy(), eps.float().cpu()


def clean_latents(model: LatentDiffusion, samples: Sequence[dict[str, Any]]) -> Tensor:
    """The scaled latents (B, C, h, w) of samples of one size: each posterior's mode, or the stored latent."""
    stored = np.stack([sample[LATENT] for sample in samples])
    batch = {model.first_stage_key: torch.from_numpy(stored).to(model.device)}
    return model.most_likely_latent(model.encode_batch(batch))


def _conditioning(model: LatentDiffusion, samples: Sequence[dict[str, Any]]) -> Conditioning:
    """The model's own encoding of the samples' captions, or what is stored where it has no text encoder."""
    member = conditioning_member(model)
    entries = [sample[member] for sample in samples]
    if isinstance(entries[0], str):
        return model.encode_conditioning({model.cond_stage_key: entries})
    return model.encode_conditioning({member: torch.from_numpy(np.stack(entries)).to(model.device)})
