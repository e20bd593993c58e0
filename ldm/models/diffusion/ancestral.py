"""Ancestral sampling, one step per training timestep (DDPM, arXiv:2006.11239, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampling import Denoiser, Predict, Sampler
from ldm.util import check_number


class AncestralSampler(Sampler):
    """Sampler of x_{t−1} from the posterior q(x_{t−1} | x_t, x₀) at the predicted x₀.

    The model needs the buffers of the posterior (`GaussianDiffusion`). `clip_denoised` clamps x₀ to [-1, 1], for models
    of pixels.
    """

    def __init__(self, model: Denoiser, clip_denoised: bool = False) -> None:
        super().__init__(model)
        self.clip_denoised = clip_denoised

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str | None = None,
        ddim_eta: float = 0.0,
        verbose: bool = False,
    ) -> None:
        """Set the last `ddim_num_steps` training timesteps. The other arguments are ignored."""
        check_number("sampling steps", ddim_num_steps, least=1, most=self.model.num_timesteps)
        self.timesteps = np.arange(ddim_num_steps, dtype=np.float64)[::-1]
        self.alphas = self.alphas_cumprod[:ddim_num_steps][::-1]
        self.alphas_prev = np.append(self.alphas[1:], 1.0)

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        x0 = predict(x, index).x0
        if self.clip_denoised:
            x0 = x0.clamp(-1, 1)
        t = torch.full((x.shape[0],), int(self.timesteps[index]), device=x.device)
        mean, _, log_variance = self.model.q_posterior(x0, x, t)
        if self.timesteps[index] == 0:
            return mean, x0
        return mean + (0.5 * log_variance).exp() * noise(), x0
