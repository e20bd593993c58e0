"""Denoising diffusion implicit models (arXiv:2010.02502)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.models.diffusion.sampling import Predict, Prediction, Sampler
from ldm.modules.diffusionmodules.schedule import noised


def ddim_step(prediction: Prediction, alpha_bar_prev: float, sigma: float = 0.0) -> Tensor:
    """Return √ᾱ_prev x₀ + √(1 − ᾱ_prev − σ²) ε: eq. 12 without σ · noise, which the caller adds."""
    return noised(prediction.x0, prediction.eps, alpha_bar_prev**0.5, (1 - alpha_bar_prev - sigma**2) ** 0.5)


class DDIMSampler(Sampler):
    """Sampler of eq. 12, with σ by eq. 16 for the given eta."""

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        alpha_bar, previous = self.alphas[index], self.alphas_prev[index]
        prediction = predict(x, index)
        sigma = self.eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)) ** 0.5
        # Sampled even if σ is 0, so that the noise of a mask does not depend on eta.
        return ddim_step(prediction, previous, sigma) + sigma * noise(), prediction.x0
