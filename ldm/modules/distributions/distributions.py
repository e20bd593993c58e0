"""Diagonal Gaussian over latents (Kingma & Welling, arXiv:1312.6114)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# Limits that keep exp(logvar) finite and above zero in float32 for any output of an untrained encoder.
_LOGVAR_RANGE = (-30.0, 20.0)


def normal_kl(mean1: torch.Tensor, logvar1: torch.Tensor, mean2: torch.Tensor, logvar2: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) in nats per element; the shapes broadcast."""
    return 0.5 * (
        logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2).square() * torch.exp(-logvar2)
    )


class DiagonalGaussianDistribution:
    """Posterior over latents of shape (B, C, h, w).

    Args:
        parameters: (B, 2C, h, w), the mean and the log-variance stacked; kept as the attribute of that name.
        deterministic: use zero variance; each sample is the mean, and divergence and likelihood are 0.
    """

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(*_LOGVAR_RANGE)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return a latent (B, C, h, w) of the parameters' dtype and device; sample `noise` if it is None."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> torch.Tensor:
        """Return the most likely latent, which is the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> torch.Tensor:
        """Return the KL divergence from `other`, or from the standard normal, in nats per example: (B,)."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        zero = torch.zeros_like(self.mean)
        mean, logvar = (zero, zero) if other is None else (other.mean, other.logvar)
        return normal_kl(self.mean, self.logvar, mean, logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: torch.Tensor, dims: Sequence[int] = (1, 2, 3)) -> torch.Tensor:
        """Return the negative log-likelihood of `sample` (B, C, h, w) in nats, summed over `dims`."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        log_density = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * log_density.sum(dim=tuple(dims))
