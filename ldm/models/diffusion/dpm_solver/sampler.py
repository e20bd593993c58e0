"""DPM-Solver++ in data prediction, multistep of order 2 (arXiv:2211.01095, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ldm.models.diffusion.sampling import Predict, Sampler
from ldm.util import UserError

# Below this many steps the last one is of order 1, for stability, as published with the solver.
_FEW_STEPS = 15


class DPMSolverSampler(Sampler):
    """Steps of algorithm 2, at the times of any spacing; by default they are equal in time."""

    spacing = "linspace"

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str | None = None,
        ddim_eta: float = 0.0,
        verbose: bool = False,
    ) -> None:
        if ddim_eta != 0:
            raise UserError(f"eta={ddim_eta}: DPM-Solver++ is deterministic; leave eta at 0, or use the ddim sampler")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def start(self) -> None:
        self.earlier: tuple[Tensor, float] | None = None  # x₀ and λ of the step before

    def step(self, x: Tensor, index: int, predict: Predict, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        alpha_bar, target = self.alphas[index], self.alphas_prev[index]
        x0 = predict(x, index).x0
        log_snr = _half_log_snr(alpha_bar)
        h = _half_log_snr(target) - log_snr
        if h == 0:  # two steps of one time
            return x, x0
        steps = len(self.timesteps)
        lowered = index == steps - 1 and (steps < _FEW_STEPS or target == 1)  # at ᾱ = 1, order 2 has no limit
        data = x0
        if self.earlier is not None and not lowered:
            earlier_x0, earlier_log_snr = self.earlier
            ratio = (log_snr - earlier_log_snr) / h
            data = x0 + (x0 - earlier_x0) / (2 * ratio)
        self.earlier = (x0, log_snr)
        sigma_ratio = math.sqrt((1 - target) / (1 - alpha_bar))
        return sigma_ratio * x - math.sqrt(target) * math.expm1(-h) * data, x0


def _half_log_snr(alpha_bar: float) -> float:
    """Return λ = log(α/σ); −∞ at a zero terminal SNR, and ∞ where no noise is left."""
    if alpha_bar in (0, 1):
        return math.inf if alpha_bar else -math.inf
    return 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))
