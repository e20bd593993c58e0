"""DPM-Solver++ in data prediction, multistep of order 2 (arXiv:2211.01095, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampling import Predict, Sampler

# With fewer steps, the last step has order 1 for stability, as in the authors' implementation.
_FEW_STEPS = 15


class DPMSolverSampler(Sampler):
    """Sampler with steps that are uniform in time. log ᾱ is interpolated linearly between training timesteps."""

    title = "DPM-Solver++"

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = False
    ) -> None:
        last = self.model.num_timesteps - 1
        self.check_schedule(ddim_num_steps, ddim_eta, most=last)
        times = np.linspace(last, 0, ddim_num_steps + 1)
        with np.errstate(divide="ignore"):  # log 0 = −∞ at zero terminal SNR
            alphas = np.exp(np.interp(times, np.arange(last + 1), np.log(self.alphas_cumprod)))
        self.timesteps, self.alphas, self.alphas_prev = times[:-1], alphas[:-1], alphas[1:]

    def start(self) -> None:
        self.earlier: tuple[Tensor, float] | None = None  # x₀ and λ of the previous step

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        alpha_bar, target = self.alphas[index], self.alphas_prev[index]
        x0 = predict(x, index).x0
        log_snr = _half_log_snr(alpha_bar)
        h = _half_log_snr(target) - log_snr
        steps = len(self.timesteps)
        lowered = steps < _FEW_STEPS and index == steps - 1
        data = x0
        if self.earlier is not None and not lowered:
            earlier_x0, earlier_log_snr = self.earlier
            ratio = (log_snr - earlier_log_snr) / h
            data = x0 + (x0 - earlier_x0) / (2 * ratio)
        self.earlier = (x0, log_snr)
        sigma_ratio = math.sqrt((1 - target) / (1 - alpha_bar))
        return sigma_ratio * x - math.sqrt(target) * math.expm1(-h) * data, x0


def _half_log_snr(alpha_bar: float) -> float:
    """Return λ = log(α/σ). It is −∞ at zero terminal SNR."""
    return -math.inf if alpha_bar == 0 else 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))
