"""Denoising loss of a model at fixed timesteps and noise, and distance of its noise prediction from another model's.

Shapes: N images per set, T timesteps, latents (C, h, w).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.evaluation.protocol import fixed_noise
from ldm.evaluation.sets import EvaluationSet, conditioning_members
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import Conditioning
from ldm.modules.diffusionmodules.schedule import extract_into_tensor, prediction_to_eps_x0
from ldm.shards.sample import CAPTION, LATENT, STREAM


class Record(NamedTuple):
    """Results of one model on one set: `loss` (N, T) float64, and the N predictions `eps` (T, C, h, w) float32."""

    loss: np.ndarray
    eps: list[Tensor]


class Comparison(NamedTuple):
    """Results of two models on one set, (N, T) float64 each: the loss of each model, and the drift between them.

    The drift is the squared relative distance of the noise predictions, ‖ε_tuned − ε_base‖² / ‖ε_base‖². A drift of
    0.01 is a distance of a tenth of the prediction's norm. It is 0 where both predictions are equal.
    """

    base: np.ndarray
    tuned: np.ndarray
    drift: np.ndarray


class _Denoised(NamedTuple):
    """Results of a batch at one timestep: positions in the set, index of the timestep, loss (B,), ε (B, C, h, w).

    Both are on the CPU.
    """

    positions: list[int]
    step: int
    loss: np.ndarray
    eps: Tensor


def record(
    model: LatentDiffusion,
    image_set: EvaluationSet,
    timesteps: Sequence[int],
    batch_size: int,
    label: str | None = None,
) -> Record:
    """Return the losses and noise predictions of `model` on `image_set`.

    A model with averaged weights is evaluated with those. `label` is the title of a progress bar; None shows no bar.
    The predictions take 4 bytes per value: 64 KiB per image and timestep for Stable Diffusion at 512×512.
    """
    loss = np.empty((len(image_set), len(timesteps)))
    eps: list[list[Tensor]] = [[] for _ in range(len(image_set))]
    for part in _denoise(model, image_set, timesteps, batch_size, label):
        loss[part.positions, part.step] = part.loss
        for position, prediction in zip(part.positions, part.eps, strict=True):
            eps[position].append(prediction)
    return Record(loss, [torch.stack(steps) for steps in eps])


def compare(
    base: Record,
    model: LatentDiffusion,
    image_set: EvaluationSet,
    timesteps: Sequence[int],
    batch_size: int,
    label: str | None = None,
) -> Comparison:
    """Compare `model` with the record `base` of the base model on the same images and timesteps."""
    loss, drift = np.empty_like(base.loss), np.empty_like(base.loss)
    for part in _denoise(model, image_set, timesteps, batch_size, label):
        loss[part.positions, part.step] = part.loss
        before = torch.stack([base.eps[position][part.step] for position in part.positions]).double()
        moved = (part.eps.double() - before).square().flatten(1).sum(1)  # (B,)
        relative = moved / before.square().flatten(1).sum(1)
        drift[part.positions, part.step] = torch.where(moved == 0, 0.0, relative).numpy()
    return Comparison(base.loss, loss, drift)


@torch.no_grad()
def _denoise(
    model: LatentDiffusion, image_set: EvaluationSet, timesteps: Sequence[int], batch_size: int, label: str | None
) -> Iterator[_Denoised]:
    """Yield the results of all batches at all timesteps.

    Nothing is random: the latent is the mode of the posterior, and the noise follows from the sample's key.
    """
    batches = list(image_set.batches(batch_size))
    with (
        model.ema_scope(),
        # `None` hides the bar if the output is not a terminal.
        tqdm(total=len(batches) * len(timesteps), desc=label, leave=False, disable=None if label else True) as bar,
    ):
        for positions in batches:
            samples = [image_set[position] for position in positions]
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
    """Return losses (B,) and noise predictions ε (B, C, h, w) of clean, scaled `latent` (B, C, h, w) at timestep `t`.

    The loss is the unweighted mean square error against the training target (arXiv:2006.11239, eq. 14). The loss
    weighting and the norm of the training configuration do not apply.
    """
    times = torch.full((len(latent),), t, device=latent.device)
    noisy = model.q_sample(latent, times, noise)
    output = model.apply_model(noisy, times, cond).float()
    error = (output - model.training_target(latent, noise, times)).square().flatten(1).mean(1)
    alpha_bar = extract_into_tensor(model.alphas_cumprod, times, noisy.shape)
    eps, _ = prediction_to_eps_x0(output, noisy, alpha_bar, model.parameterization)
    return error.double().cpu().numpy(), eps.float().cpu()


def clean_latents(model: LatentDiffusion, samples: Sequence[dict[str, Any]]) -> Tensor:
    """Return scaled latents (B, C, h, w) of samples of one size: the modes of stored posteriors, or stored latents."""
    stored = np.stack([sample[LATENT] for sample in samples])
    batch = {model.first_stage_key: torch.from_numpy(stored).to(model.device)}
    return model.most_likely_latent(model.encode_batch(batch))


def _conditioning(model: LatentDiffusion, samples: Sequence[dict[str, Any]]) -> Conditioning:
    """Encode the samples' captions; for a model without a text encoder, take the stored caption embeddings.

    Sizes and maps are the stored ones. Of several masks of a sample, the first is used.
    """
    members = conditioning_members(model)
    stored = {member: member for member in members if member != CAPTION}
    stored[model.first_stage_key] = LATENT  # whose size is that of the maps
    batch: dict[str, Any] = {
        entry: torch.from_numpy(np.stack([sample[member] for sample in samples])).to(model.device)
        for entry, member in stored.items()
    }
    batch[STREAM] = [f"evaluation/{sample['__key__']}" for sample in samples]  # of what is sampled from posteriors
    if CAPTION in members:
        return model.condition_on_captions([sample[CAPTION] for sample in samples], batch)
    return model.encode_conditioning(batch)
