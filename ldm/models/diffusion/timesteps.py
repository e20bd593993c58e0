"""Distributions of training timesteps, chosen by `timestep_config`. Validation samples uniform timesteps.

B: batch. T: timesteps of the schedule. N: bins of timesteps. K: losses kept per bin. x (B, …): the clean batch.
t (B,): timesteps, counted from 0.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.distributed.collectives import gathered_over_processes
from ldm.models.diffusion.batch_mean import Mean
from ldm.models.diffusion.random_streams import RandomStreams
from ldm.util import UserError, check_number, instantiate_from_config, refuse_if

logger = logging.getLogger(__name__)

STATE = "timestep_distribution"  # key of `Uniform.state` in a training checkpoint


class Scheduled(Protocol):
    """Parts of a model that distributions read, or register in `attach`."""

    num_timesteps: int
    alphas_cumprod: Tensor  # (T,)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None: ...


class Uniform:
    """Uniform timesteps, as in arXiv:2006.11239, algorithm 1. Base of all distributions.

    A subclass overrides `cumulative`, the distribution over the whole schedule.

    Args:
        min_timestep, max_timestep: lowest and highest timestep. None stands for the end of the schedule.
        stratified: sample each timestep of a batch from a part of its own of B equally probable parts, in random order.
            This keeps the distribution of each sample, and lowers the variance of the mean loss (arXiv:2107.00630,
            appendix I.1). A batch is that of one process, so losses depend on the number of processes.

    Raises:
        UserError: `min_timestep` is above `max_timestep`, or one of them is not in the schedule.
    """

    def __init__(self, min_timestep: int = 0, max_timestep: int | None = None, stratified: bool = False) -> None:
        self.low, self.high, self.stratified = min_timestep, max_timestep, stratified

    def attach(self, model: Scheduled) -> None:
        """Check the range, and register the cumulative distribution `timestep_cdf` (T + 1,) on `model`."""
        last = model.num_timesteps - 1
        self.high = last if self.high is None else self.high
        check_number("min_timestep", self.low, least=0, most=last)
        check_number("max_timestep", self.high, least=self.low, most=last)
        edges = self.cumulative(model)
        inside = edges[self.high + 1] - edges[self.low]
        refuse_if(not inside > 0, f"timestep_config: timesteps {self.low} to {self.high} have probability 0")
        if edges[self.high + 1] == edges[self.high] and model.alphas_cumprod[self.high] == 0:
            kind = type(self).__name__
            logger.warning(
                "timestep_config: %s never samples the last timestep, which is pure noise: it is not trained", kind
            )
        cdf = ((edges - edges[self.low]) / inside).clip(0.0, 1.0)
        model.register_buffer("timestep_cdf", torch.tensor(cdf, dtype=torch.float32), persistent=False)

    def cumulative(self, model: Scheduled) -> np.ndarray:
        """Return the probability of the timesteps below 0, 1, …, T: float64 (T + 1,), ascending from 0 to 1."""
        return np.linspace(0.0, 1.0, model.num_timesteps + 1)

    @property
    def is_plain(self) -> bool:
        """True if the timesteps of a batch are independent and uniform."""
        return type(self) is Uniform and not self.stratified

    def sample(self, model: Scheduled, x: Tensor, streams: RandomStreams) -> Tensor:
        """Return the timesteps (B,) of a batch."""
        if self.is_plain:
            return self.low + streams.integers("timestep", self.high + 1 - self.low, x)
        quantiles = streams.uniform("timestep", x)
        if self.stratified:
            parts = streams.uniform("timestep part", x).argsort()  # a random permutation of 0 to B − 1
            quantiles = (parts + quantiles) / len(x)
        # rounding may give the quantile 1
        return torch.searchsorted(model.timestep_cdf[1:], quantiles, right=True).clamp(self.low, self.high)

    def of_prior(self, t: Tensor) -> Tensor:
        """Return the timesteps (B,) of the samples of a batch if they are prior samples, given their usual `t`."""
        return t

    def unbiased(self, model: Scheduled, mean: Mean, t: Tensor) -> Mean:
        """Return the mean of training losses at the sampled `t`."""
        return mean

    def observe(self, model: Scheduled, losses: Tensor, t: Tensor) -> None:
        """Note the losses (B,) of a training batch."""

    def state(self, model: Scheduled) -> dict[str, Tensor]:
        """Return the values that a resumed run needs."""
        return {}

    def load_state(self, model: Scheduled, state: Mapping[str, Tensor]) -> None:
        """Set the values of `state`."""


class LogNormal(Uniform):
    """Normally distributed ln σ, with σ = √((1 − ᾱ) / ᾱ) (EDM, arXiv:2206.00364, table 1).

    Args:
        mean, std: parameters of ln σ. The defaults are those of EDM.
        options: arguments of `Uniform`.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, **options: Any) -> None:
        check_number("mean", mean, whole=False)
        check_number("std", std, above=0, whole=False)
        super().__init__(**options)
        self.mean, self.std = mean, std

    def cumulative(self, model: Scheduled) -> np.ndarray:
        alpha_bar = model.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore"):  # ᾱ is 0 at zero terminal SNR
            log_sigma = 0.5 * np.log((1 - alpha_bar) / alpha_bar)
        between = (log_sigma[1:] + log_sigma[:-1]) / 2  # a timestep has the part of the line that is nearest to it
        normal = [0.5 * (1 + math.erf((edge - self.mean) / (self.std * math.sqrt(2)))) for edge in between]
        return np.array([0.0, *normal, 1.0])


class CosMap(Uniform):
    """Density 2 / (π − 2πτ + 2πτ²) of τ = t / T (arXiv:2403.03206, section 3.1), which favours the middle."""

    def cumulative(self, model: Scheduled) -> np.ndarray:
        tau = np.linspace(0.0, 1.0, model.num_timesteps + 1)
        return 2 / np.pi * np.arctan2(tau, 1 - tau)


class Mode(Uniform):
    """τ = 1 − u − s (cos²(πu / 2) − 1 + u) for uniform u, with τ = t / T (arXiv:2403.03206, section 3.1).

    Args:
        scale: s, from -1 to 2 / (π − 2). Above 0 it favours the middle, and below 0 both ends.
        options: arguments of `Uniform`.
    """

    def __init__(self, scale: float = 1.29, **options: Any) -> None:
        check_number("scale", scale, least=-1, most=2 / (math.pi - 2), whole=False)
        super().__init__(**options)
        self.scale = scale

    def cumulative(self, model: Scheduled) -> np.ndarray:
        u = np.linspace(1.0, 0.0, 100 * model.num_timesteps + 1)
        tau = 1 - u - self.scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)  # ascending
        cdf = np.interp(np.linspace(0.0, 1.0, model.num_timesteps + 1), tau, 1 - u)
        cdf[[0, -1]] = 0.0, 1.0
        return cdf


class Split(Uniform):
    """Density (1 + p) τ^p for training samples and (1 + p) (1 − τ)^p for prior samples, with τ = t / T.

    Training samples thus have high noise, where the new subject differs, and prior samples low noise, where a base is
    general. Sampling by these densities has the same expectation as the loss weights of Diff-Tuning, which rise for
    the adaptation and fall for the retention (arXiv:2406.00773, section 3).

    Args:
        power: p. 0 is uniform, 1 linear.
        stratified: see `Uniform`.
    """

    def __init__(self, power: float = 1.0, stratified: bool = False) -> None:
        check_number("power", power, least=0, whole=False)
        super().__init__(stratified=stratified)
        self.power = power

    def cumulative(self, model: Scheduled) -> np.ndarray:
        return super().cumulative(model) ** (1 + self.power)

    def of_prior(self, t: Tensor) -> Tensor:
        return self.low + self.high - t


class LossAware(Uniform):
    """Importance sampling: probability proportional to √E[L²], and losses divided by it (arXiv:2102.09672, eq. 18).

    The expected loss and its gradient are those of uniform timesteps, with less variance. E[L²] is the mean over the
    last losses of each bin of neighbouring timesteps. Timesteps are uniform until every bin has all its losses, about
    N · K · 3 samples.

    Args:
        bins: N. The paper has one bin per timestep, which takes tens of thousands of samples to fill.
        history: K.
        uniform: share of uniform timesteps, which bounds the weight of a sample.
        stratified: see `Uniform`.
    """

    def __init__(self, bins: int = 50, history: int = 10, uniform: float = 0.05, stratified: bool = False) -> None:
        check_number("bins", bins, least=1)
        check_number("history", history, least=1)
        check_number("uniform", uniform, above=0, most=1, whole=False)
        super().__init__(stratified=stratified)
        self.bins, self.history, self.share = bins, history, uniform

    def attach(self, model: Scheduled) -> None:
        super().attach(model)
        check_number("bins", self.bins, most=model.num_timesteps)
        # One more row takes the losses that nothing reads.
        model.register_buffer("timestep_losses", torch.zeros(self.bins + 1, self.history), persistent=False)
        model.register_buffer("timestep_counts", torch.zeros(self.bins + 1, dtype=torch.long), persistent=False)

    def density(self, model: Scheduled) -> Tensor:
        """Return T times the probability of each timestep, (T,)."""
        root = model.timestep_losses[:-1].square().mean(1).sqrt()  # N
        t = torch.arange(model.num_timesteps, device=root.device)
        weights = root[self._bin(model, t)]
        weights = self.share + (1 - self.share) * weights / weights.mean()
        ready = (model.timestep_counts[:-1] >= self.history).all() & (root.sum() > 0)
        return torch.where(ready, weights, 1.0)

    def _bin(self, model: Scheduled, t: Tensor) -> Tensor:
        return t * self.bins // model.num_timesteps

    def sample(self, model: Scheduled, x: Tensor, streams: RandomStreams) -> Tensor:
        model.timestep_cdf[1:] = (self.density(model).double().cumsum(0) / model.num_timesteps).float()
        return super().sample(model, x, streams)

    def unbiased(self, model: Scheduled, mean: Mean, t: Tensor) -> Mean:
        density = self.density(model)[t]
        return lambda values: mean(values / density)

    @torch.no_grad()
    def observe(self, model: Scheduled, losses: Tensor, t: Tensor) -> None:
        """Note the losses (B,) of the batches of all processes, as the last of their bins."""
        losses, t = gathered_over_processes(losses.detach().float()), gathered_over_processes(t)
        rows = self._bin(model, t)
        same = rows[:, None] == rows[None]
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)  # samples of the same bin in this batch
        columns = (model.timestep_counts[rows] + earlier) % self.history
        kept = torch.where(later < self.history, rows, self.bins)  # not two losses in one place
        model.timestep_losses[kept, columns] = losses
        model.timestep_counts.index_add_(0, rows, torch.ones_like(rows))

    def state(self, model: Scheduled) -> dict[str, Tensor]:
        return {"losses": model.timestep_losses[:-1].clone(), "counts": model.timestep_counts[:-1].clone()}

    def load_state(self, model: Scheduled, state: Mapping[str, Tensor]) -> None:
        losses, counts = state.get("losses"), state.get("counts")
        if losses is None or losses.shape != (self.bins, self.history):
            logger.info("LossAware: the checkpoint has no losses of these bins; timesteps start uniform")
            return
        model.timestep_losses[:-1].copy_(losses)
        model.timestep_counts[:-1].copy_(counts)


def distribution_of(config: Mapping[str, Any] | None) -> Uniform:
    """Return the distribution of `timestep_config`, by default `Uniform`.

    Raises:
        UserError: the config does not name a distribution of timesteps.
    """
    if not config:
        return Uniform()
    distribution = instantiate_from_config(config)
    if not isinstance(distribution, Uniform):
        names = ", ".join(kind.__name__ for kind in (Uniform, LogNormal, CosMap, Mode, Split, LossAware))
        raise UserError(f"timestep_config: {config['target']} is not a distribution; {__name__} has {names}")
    return distribution
