"""Pseudo linear multistep sampling (arXiv:2202.09778)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import ddim_step
from ldm.models.diffusion.sampling import Predict, Prediction, Sampler
from ldm.modules.diffusionmodules.schedule import prediction_to_eps_x0

# Adams-Bashforth weights of orders 2 to 4, from the newest to the oldest prediction (eq. 9 and appendix).
_ADAMS_BASHFORTH = (
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class PLMSSampler(Sampler):
    """Sampler of DDIM steps with a linear combination of up to four noise predictions."""

    title = "PLMS"
    is_deterministic = True
    has_equal_steps = True

    def start(self) -> None:
        self.earlier: list[Tensor] = []

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        previous = self.alphas_prev[index]
        prediction = predict(x, index)
        if self.alphas[index] == 0:  # x is pure noise, and x₀ does not follow from ε
            return ddim_step(prediction, previous), prediction.x0
        if self.earlier:
            history = [prediction.eps, *self.earlier]
            weights = _ADAMS_BASHFORTH[len(self.earlier) - 1]
            eps = sum(weight * value for weight, value in zip(weights, history, strict=True))
        else:
            # Pseudo improved Euler method: the mean of the predictions at the start and the end of the step.
            following = min(index + 1, len(self.timesteps) - 1)
            eps = (prediction.eps + predict(ddim_step(prediction, previous), following).eps) / 2
        self.earlier = [prediction.eps, *self.earlier][:3]
        alpha_bar = torch.full((), self.alphas[index], device=x.device, dtype=x.dtype)
        combined = Prediction(*prediction_to_eps_x0(eps, x, alpha_bar, "eps"))
        return ddim_step(combined, previous), combined.x0
