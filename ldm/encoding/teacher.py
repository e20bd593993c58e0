"""What a frozen model predicts at fixed latents, timesteps and noises, for training to match without that model.

Knowledge distillation on the prior (arXiv:1503.02531), with the teacher's part done ahead of time.
B batch; K questions a sample; C, h, w channels, height and width of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.latent import LatentDiffusion
from ldm.shards.sample import CONTEXT, NOISE, PREDICTION, STORED, TIMESTEPS
from ldm.util import UserError


def stratified_timesteps(random: np.random.Generator, count: int, timesteps: int) -> np.ndarray:
    """Int32 (count,), rising: one timestep, uniformly drawn, of each of `count` equal parts of 0 … `timesteps` - 1."""
    return ((np.arange(count) + random.random(count)) * timesteps / count).astype(np.int32)


class Teacher:
    """`model`, asked `count` times about each sample; the questions follow from `seed` and the sample's number.

    Raises:
        UserError: `count` is not from 1 to the model's timesteps.
    """

    def __init__(self, model: LatentDiffusion, count: int, seed: int) -> None:
        if not 1 <= count <= model.num_timesteps:
            raise UserError(f"--teacher {count}: choose 1 to {model.num_timesteps} timesteps a sample")
        self.model = model
        self.count = count
        self.seed = seed

    def answers(
        self, numbers: Sequence[int], latents: np.ndarray, encodings: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """Return what is asked and predicted about unscaled `latents` (B, C, h, w) under text `encodings` (B, ...).

        A sample has `TIMESTEPS`, int32 (K,); `NOISE`, float16 (K, C, h, w); and `PREDICTION`, like it: the output of
        the model at √ᾱ_t · scale_factor · latent + √(1 − ᾱ_t) · noise, in its own parameterization.

        Raises:
            UserError: a prediction is not finite in float16.
        """
        generators = [np.random.default_rng([self.seed, number]) for number in numbers]
        t = np.stack([stratified_timesteps(g, self.count, self.model.num_timesteps) for g in generators])  # B K
        shape = (self.count, *latents.shape[1:])
        noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]).astype(STORED)
        prediction = self._predict(latents, encodings, torch.from_numpy(t), torch.from_numpy(noise)).numpy()
        if not np.isfinite(prediction).all():
            raise UserError("the model predicts NaN or infinity; try --precision fp32")
        arrays = {TIMESTEPS: t, NOISE: noise, PREDICTION: prediction}
        return [{key: values[i] for key, values in arrays.items()} for i in range(len(numbers))]

    @torch.no_grad()
    def _predict(self, latents: np.ndarray, encodings: Mapping[str, np.ndarray], t: Tensor, noise: Tensor) -> Tensor:
        """Return float16 (B, K, C, h, w), of the values as they are stored: training sees no others."""
        device = self.model.alphas_cumprod.device
        x = self.model.scale_factor * torch.from_numpy(latents).to(device).float()
        conds = {key: torch.from_numpy(value).to(device).float() for key, value in encodings.items()}
        cond = conds[CONTEXT] if len(conds) == 1 else conds
        predictions = []
        with self.model.ema_scope():
            for t_k, noise_k in zip(t.to(device).long().T, noise.to(device).float().unbind(1), strict=True):
                predictions.append(self.model.apply_model(self.model.q_sample(x, t_k, noise_k), t_k, cond))
        return torch.stack(predictions, dim=1).half().cpu()
