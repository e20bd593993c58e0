"""DPM-Solver++ in data prediction, multistep of order 2 (arXiv:2211.01095, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampling import Predict, Sampler
from ldm.util import UserError

# Below this many steps the last one is of order 1, for stability, as published with the solver.
_FEW_STEPS = 15


class DPMSolverSampler(Sampler):
    """Steps uniform in time; between training timesteps, log ᾱ is interpolated linearly."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = False
    ) -> None:
        if ddim_eta != 0:
            raise UserError(f"eta={ddim_eta}: DPM-Solver++ is deterministic; leave eta at 0, or use the ddim sampler")
        last = self.model.num_timesteps - 1
        if not 1 <= ddim_num_steps <= last:
            raise UserError(f"{ddim_num_steps} sampling steps: choose 1 to {last}")
        times = np.linspace(last, 0, ddim_num_steps + 1)
        with np.errstate(divide="ignore"):  # the logarithm of 0, at a zero terminal SNR, is −∞
            alphas = np.exp(np.interp(times, np.arange(last + 1), np.log(self.alphas_cumprod)))
        self.timesteps, self.alphas, self.alphas_prev = times[:-1], alphas[:-1], alphas[1:]

    def start(self) -> None:
        self.earlier: tuple[Tensor, float] | None = None  # x₀ and λ of the step before

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
    """Return λ = log(α/σ); −∞ at a zero terminal SNR."""
    return -math.inf if alpha_bar == 0 else 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))
