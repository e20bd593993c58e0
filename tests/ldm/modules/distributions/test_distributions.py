"""The diagonal Gaussian against torch.distributions."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl


def parameters(seed: int) -> torch.Tensor:
    return torch.randn(3, 8, 2, 5, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def normal(posterior: DiagonalGaussianDistribution) -> Normal:
    return Normal(posterior.mean, posterior.std)


def test_statistics() -> None:
    posterior = DiagonalGaussianDistribution(parameters(0))
    mean, logvar = parameters(0)[:, :4], parameters(0)[:, 4:]
    torch.testing.assert_close(posterior.mode(), mean)
    torch.testing.assert_close(posterior.logvar, logvar)
    torch.testing.assert_close(posterior.var, logvar.exp())
    torch.testing.assert_close(posterior.std.square(), posterior.var)


def test_kl() -> None:
    first, second = (DiagonalGaussianDistribution(parameters(seed)) for seed in (0, 1))
    standard = Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(first.kl(), kl_divergence(normal(first), standard).sum((1, 2, 3)))
    torch.testing.assert_close(first.kl(second), kl_divergence(normal(first), normal(second)).sum((1, 2, 3)))
    torch.testing.assert_close(first.kl(first), torch.zeros(3, dtype=torch.double))
    pairwise = normal_kl(first.mean, first.logvar, second.mean, second.logvar)
    torch.testing.assert_close(pairwise, kl_divergence(normal(first), normal(second)))


def test_nll() -> None:
    posterior = DiagonalGaussianDistribution(parameters(0))
    x = parameters(1)[:, :4]
    density = -normal(posterior).log_prob(x)
    torch.testing.assert_close(posterior.nll(x), density.sum((1, 2, 3)))
    torch.testing.assert_close(posterior.nll(x, dims=[1]), density.sum(1))


def test_samples_have_the_posterior_s_moments() -> None:
    torch.manual_seed(0)
    posterior = DiagonalGaussianDistribution(torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 300, 300))
    samples = posterior.sample()
    torch.testing.assert_close(samples.mean(), torch.tensor(2.0), atol=0.01, rtol=0)
    torch.testing.assert_close(samples.var(), torch.tensor(-1.0).exp(), atol=0.01, rtol=0)


def test_sample_is_seeded_by_its_generator() -> None:
    posterior = DiagonalGaussianDistribution(parameters(0))
    first, second = (posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)


def test_deterministic() -> None:
    posterior = DiagonalGaussianDistribution(parameters(0), deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mean)
    assert torch.equal(posterior.kl(), torch.zeros(3, dtype=torch.double))
    assert torch.equal(posterior.nll(posterior.mean), torch.zeros(3, dtype=torch.double))


def test_extreme_log_variances_stay_finite() -> None:
    posterior = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, 1e4, -1e4]).reshape(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0]
    assert all(
        value.isfinite().all() for value in (posterior.kl(), posterior.std, posterior.nll(torch.zeros(1, 2, 1, 1)))
    )
