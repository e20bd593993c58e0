"""DPM-Solver++ in data prediction, multistep of order 2 (arXiv:2211.01095, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ldm.models.diffusion.sampling import Predict, Sampler

# With fewer steps, the last step has order 1 for stability, as in the authors' implementation.
_FEW_STEPS = 15


class DPMSolverSampler(Sampler):
    """Sampler of second-order steps. By default they are uniform in time."""

    title = "DPM-Solver++"
    is_deterministic = True
    spacing = "linspace"

    def start(self) -> None:
        self.earlier: tuple[Tensor, float] | None = None  # x₀ and λ of the previous step

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        alpha_bar, target = self.alphas[index], self.alphas_prev[index]
        x0 = predict(x, index).x0
        log_snr = _half_log_snr(alpha_bar)
        h = _half_log_snr(target) - log_snr
        if h == 0:
            return x, x0
        steps = len(self.timesteps)
        lowered = index == steps - 1 and (steps < _FEW_STEPS or target == 1)  # order 2 diverges at ᾱ = 1
        data = x0
        if self.earlier is not None and not lowered:
            earlier_x0, earlier_log_snr = self.earlier
            ratio = (log_snr - earlier_log_snr) / h
            data = x0 + (x0 - earlier_x0) / (2 * ratio)
        self.earlier = (x0, log_snr)
        sigma_ratio = math.sqrt((1 - target) / (1 - alpha_bar))
        return sigma_ratio * x - math.sqrt(target) * math.expm1(-h) * data, x0


def _half_log_snr(alpha_bar: float) -> float:
    """Return λ = log(α/σ). It is −∞ at zero terminal SNR, and ∞ without noise."""
    if alpha_bar in (0, 1):
        return math.inf if alpha_bar else -math.inf
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))
