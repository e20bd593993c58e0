"""Predictions of a frozen model at fixed latents, timesteps and noises. Training matches them without that model.

This is knowledge distillation (arXiv:1503.02531) on the prior, with the teacher evaluated ahead of time.
B: batch. K: predictions per sample. C, h, w: channels, height and width of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.latent import LatentDiffusion
from ldm.shards.sample import NOISE, PREDICTION, STORED, TIMESTEPS
from ldm.util import refuse_if


def stratified_timesteps(random: np.random.Generator, count: int, timesteps: int, power: float = 0.0) -> np.ndarray:
    """Sample one timestep from each of `count` equally probable parts of the schedule: int32 (count,), ascending.

    The density of τ = t / T is (1 + p) (1 − τ)^p for the `power` p, that of the prior in
    `ldm.models.diffusion.timesteps.Split`. 0 is uniform.
    """
    tau = (np.arange(count) + random.random(count)) / count
    if power:
        tau = 1 - (1 - tau) ** (1 / (1 + power))
    return np.minimum(tau * timesteps, timesteps - 1).astype(np.int32)  # a large power may round τ to 1


class Teacher:
    """Frozen `model` that makes `count` predictions per sample.

    Timesteps and noises depend only on `seed` and the number of the sample. `power` is that of `stratified_timesteps`.

    Raises:
        UserError: `count` is not from 1 to the model's timesteps.
    """

    def __init__(self, model: LatentDiffusion, count: int, seed: int, power: float = 0.0) -> None:
        refuse_if(
            not 1 <= count <= model.num_timesteps,
            f"--teacher {count}: must be 1 to {model.num_timesteps} timesteps per sample",
        )
        self.model = model
        self.count = count
        self.seed = seed
        self.power = power

    def answers(
        self, numbers: Sequence[int], latents: np.ndarray, conditions: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """Return timesteps, noises and predictions for unscaled `latents` (B, C, h, w).

        `conditions` are the encodings of captions (B, ...) by member, and sizes (B, 2) by the model's entry.

        Each sample has `TIMESTEPS`, int32 (K,); `NOISE`, float16 (K, C, h, w); and `PREDICTION`, float16 (K, C, h, w):
        the model's output at √ᾱ_t · scale_factor · latent + √(1 − ᾱ_t) · noise, in the model's parameterization.

        Raises:
            UserError: a prediction is not finite in float16.
        """
        generators = [np.random.default_rng([self.seed, number]) for number in numbers]
        steps = self.model.num_timesteps
        t = np.stack([stratified_timesteps(g, self.count, steps, self.power) for g in generators])  # B K
        shape = (self.count, *latents.shape[1:])
        noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]).astype(STORED)
        prediction = self._predict(latents, conditions, torch.from_numpy(t), torch.from_numpy(noise)).numpy()
        refuse_if(not np.isfinite(prediction).all(), "the model predicts NaN or infinity; try --precision fp32")
        arrays = {TIMESTEPS: t, NOISE: noise, PREDICTION: prediction}
        return [{key: values[i] for key, values in arrays.items()} for i in range(len(numbers))]

    @torch.no_grad()
    def _predict(self, latents: np.ndarray, conditions: Mapping[str, np.ndarray], t: Tensor, noise: Tensor) -> Tensor:
        """Return predictions, float16 (B, K, C, h, w), for the rounded values that training reads."""
        device = self.model.alphas_cumprod.device
        x = self.model.scale_factor * torch.from_numpy(latents).to(device).float()
        sample = {key: torch.from_numpy(value).to(device).float() for key, value in conditions.items()}
        cond = self.model.stored_conditioning(sample)
        predictions = []
        with self.model.ema_scope():
            for t_k, noise_k in zip(t.to(device).long().T, noise.to(device).float().unbind(1), strict=True):
                predictions.append(self.model.apply_model(self.model.q_sample(x, t_k, noise_k), t_k, cond))
        return torch.stack(predictions, dim=1).half().cpu()
