"""Distributions of timesteps: their probabilities, by hand and by counting, and their use in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.preservation import Prior
from ldm.models.diffusion.random_streams import GLOBAL_STREAM, RandomStreams
from ldm.models.diffusion.timesteps import CosMap, LogNormal, LossAware, Mode, Split, Uniform
from ldm.util import UserError
from tests.ldm.models.diffusion.conftest import batch_of

ModelFactory = Callable[..., LatentDiffusion]


def schedule(count: int = 4, alphas_cumprod: torch.Tensor | None = None) -> SimpleNamespace:
    model = SimpleNamespace(num_timesteps=count, alphas_cumprod=alphas_cumprod)
    model.register_buffer = lambda name, tensor, persistent: setattr(model, name, tensor)
    return model


def probabilities(distribution: Uniform, model: SimpleNamespace) -> list[float]:
    distribution.attach(model)
    return model.timestep_cdf.diff().tolist()


def config(name: str, **params: Any) -> dict[str, Any]:
    return {"timestep_config": {"target": f"ldm.models.diffusion.timesteps.{name}", "params": params}}


def test_uniform_of_a_range() -> None:
    assert probabilities(Uniform(1, 2), schedule()) == [0, 0.5, 0.5, 0]


def test_cos_map_by_hand() -> None:
    """The cumulative distribution of τ is (2 / π) atan(τ / (1 − τ)): 0.2048 at 1/4."""
    low = 2 / math.pi * math.atan(1 / 3)
    assert probabilities(CosMap(), schedule()) == pytest.approx([low, 0.5 - low, 0.5 - low, low])
    assert probabilities(CosMap(max_timestep=1), schedule()) == pytest.approx([2 * low, 1 - 2 * low, 0, 0])


def test_mode_by_hand() -> None:
    """u = 1/2 gives τ = 1/2 whatever s is, and s = 0 is uniform. u = 1/3 and s = 1 give τ = 1 − 1/3 − (3/4 − 2/3)."""
    assert probabilities(Mode(0.0), schedule()) == pytest.approx([0.25] * 4)
    upper = probabilities(Mode(1.0), schedule(12))[7:]  # τ from 7/12
    assert sum(upper) == pytest.approx(1 / 3, abs=1e-6)
    ends = probabilities(Mode(-1.0), schedule())
    assert ends[0] == pytest.approx(ends[3]) and ends[0] > 0.3


def test_split_by_hand() -> None:
    """The cumulative distribution of training samples is τ², with τ = 1/4, 1/2 and 3/4."""
    rising = Split()
    assert probabilities(rising, schedule()) == pytest.approx([1 / 16, 3 / 16, 5 / 16, 7 / 16])
    assert rising.of_prior(torch.tensor([0, 1, 3])).tolist() == [3, 2, 0]
    assert probabilities(Split(0.0), schedule()) == pytest.approx([0.25] * 4)


def test_Split_gives_prior_samples_mirrored_timesteps(make_model: ModelFactory) -> None:
    model = make_model(**config("Split", power=2))
    batch = batch_of((2, 4, 8, 8)) | {"is_prior": torch.tensor([True, False])}
    samples, t, noise = model.samples_of(batch), torch.tensor([1, 1]), torch.zeros(2, 4, 8, 8)
    found, same = samples.timesteps_and_noise(t, noise)
    assert found.tolist() == [model.num_timesteps - 2, 1] and same is noise


def test_log_normal_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """σ = e⁻², 1 and e² have the edges ln σ = −1 and 1 between them, one standard deviation from 0."""
    sigma = torch.tensor([-2.0, 0.0, 2.0]).double().exp()
    model = schedule(3, 1 / (1 + sigma**2))
    assert probabilities(LogNormal(0.0, 1.0), model) == pytest.approx([0.158655, 0.682689, 0.158655], abs=1e-5)
    zero_snr = schedule(3, torch.tensor([0.9, 0.5, 0.0]))
    assert "pure noise" not in caplog.text
    assert probabilities(LogNormal(0.0, 1.0), zero_snr)[2] == 0
    assert "LogNormal never samples the last timestep, which is pure noise" in caplog.text


@pytest.mark.parametrize(
    "distribution", [Uniform(1), Uniform(stratified=True), CosMap(), CosMap(stratified=True), Mode(0.8, max_timestep=2)]
)
def test_samples_of_rows_have_the_probabilities(distribution: Uniform) -> None:
    model, count = schedule(), 4000
    expected = torch.tensor(probabilities(distribution, model))
    names = [f"23/0/{number}" for number in range(count)]
    batches = [RandomStreams(names[start : start + 8]) for start in range(0, count, 8)]
    t = torch.cat([distribution.sample(model, torch.zeros(8, 1), streams) for streams in batches])
    assert t.dtype == torch.long
    assert (t.bincount(minlength=4) / count - expected).abs().max() < 0.03
    # the first row of a batch has the same distribution
    assert (t[::8].bincount(minlength=4) * 8 / count - expected).abs().max() < 0.08


def test_stratified_timesteps_are_one_of_each_part() -> None:
    model, distribution = schedule(1000), Uniform(stratified=True)
    distribution.attach(model)
    for _ in range(5):
        t = distribution.sample(model, torch.zeros(8, 1), GLOBAL_STREAM)
        assert sorted((t // 125).tolist()) == list(range(8))


def test_stratified_timesteps_lower_the_variance_of_the_mean() -> None:
    """The loss falls with the timestep, as that of ε does. The variance for eight samples falls about tenfold."""
    model, losses = schedule(1000), 1 / (1 + torch.arange(1000) / 100)
    means = {}
    torch.manual_seed(0)
    for stratified in (False, True):
        distribution = Uniform(stratified=stratified)
        distribution.attach(model)
        batches = [losses[distribution.sample(model, torch.zeros(8, 1), GLOBAL_STREAM)].mean() for _ in range(400)]
        means[stratified] = torch.stack(batches)
    assert means[True].mean().item() == pytest.approx(means[False].mean().item(), rel=0.1)
    assert means[True].var() < means[False].var() / 5


def test_loss_aware_by_hand() -> None:
    """Losses 3, 3 and 1, 1 of two bins of two timesteps: probabilities 3/8 and 1/8, mixed with 10 % uniform ones."""
    model, distribution = schedule(4), LossAware(bins=2, history=2, uniform=0.1)
    distribution.attach(model)
    assert distribution.density(model).tolist() == [1, 1, 1, 1]
    distribution.observe(model, torch.tensor([9.0, 3, 3, 1]), torch.tensor([0, 1, 0, 2]))  # 9 is overwritten
    assert distribution.density(model).tolist() == [1, 1, 1, 1], "the second bin has one loss only"
    distribution.observe(model, torch.tensor([1.0]), torch.tensor([3]))
    distribution.observe(model, torch.tensor([3.0]), torch.tensor([1]))
    expected = [1.45, 1.45, 0.55, 0.55]
    assert distribution.density(model).tolist() == pytest.approx(expected)
    mean = distribution.unbiased(model, torch.mean, torch.tensor([0, 3]))
    assert mean(torch.tensor([2.9, 1.1])).item() == pytest.approx(2.0)
    t = distribution.sample(model, torch.zeros(4000, 1), GLOBAL_STREAM)
    assert (t.bincount(minlength=4) / 1000).tolist() == pytest.approx(expected, abs=0.15)
    other = schedule(4)
    resumed = LossAware(bins=2, history=2, uniform=0.1)
    resumed.attach(other)
    resumed.load_state(other, distribution.state(model))
    assert resumed.density(other).tolist() == distribution.density(model).tolist()


def test_loss_aware_keeps_the_last_losses_of_a_bin() -> None:
    model, distribution = schedule(4), LossAware(bins=1, history=2)
    distribution.attach(model)
    distribution.observe(model, torch.arange(7.0), torch.zeros(7, dtype=torch.long))
    assert sorted(model.timestep_losses[0].tolist()) == [5, 6] and model.timestep_counts[0] == 7


def test_distributions_are_of_training_only(make_model: ModelFactory) -> None:
    model = make_model(**config("Uniform", min_timestep=990))
    x = batch_of((64, 4, 8, 8))["f8"]
    assert model.train().sample_timesteps(x).min() >= 990
    assert model.eval().sample_timesteps(x).min() < 900


def test_loss_aware_corrects_the_loss_of_the_model(make_model: ModelFactory) -> None:
    model = make_model(**config("LossAware", bins=2, history=1, uniform=0.1)).train()
    model.timestep_losses[:2, 0], model.timestep_counts[:2] = torch.tensor([3.0, 1.0]), 1
    t, errors = torch.tensor([3, 999]), torch.tensor([2.9, 1.1]).sqrt()
    loss, logged = model.training_loss(errors[:, None, None, None].expand(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), t)
    assert loss.item() == logged["train/loss_simple"].item() == pytest.approx(2.0)
    assert model.timestep_losses[:2, 0].tolist() == pytest.approx([2.9, 1.1])
    assert not [key for key in model.state_dict() if "timestep" in key]
    model.timestep_losses[:2, 0] = torch.tensor([3.0, 1.0])  # densities 1.45 and 0.55
    prior = Prior(torch.tensor([False, True]), weight=0.5)
    zeros = torch.zeros(2, 4, 8, 8)
    loss, logged = model.training_loss(errors[:, None, None, None].expand(2, 4, 8, 8), zeros, t, prior)
    assert logged["train/loss_prior"].item() == pytest.approx(2.0)
    assert loss.item() == pytest.approx(2.0 + 0.5 * 2.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (config("Uniform", min_timestep=1000), "min_timestep 1000: give a whole number from 0 to 999"),
        (config("CosMap", min_timestep=5, max_timestep=4), "max_timestep 4: give a whole number from 5 to 999"),
        (config("LogNormal", std=0), "std 0: give a number above 0"),
        (config("LogNormal", mean=-100), "timesteps 1 to 999 have probability 0"),
        (config("Mode", scale=2), "scale 2: give a number from -1"),
        (config("LossAware", bins=2000), "bins 2000"),
        (config("Split") | {"num_timesteps_cond": 2}, "Split gives prior samples other timesteps"),
        (config("LossAware") | {"prior_target": "teacher"}, "LossAware chooses timesteps, but prior_target: teacher"),
        ({"timestep_config": {"target": "torch.nn.Identity"}}, "Identity is not a distribution; .* has Uniform"),
    ],
)
def test_timestep_config_that_cannot_be(make_model: ModelFactory, given: dict, said: str) -> None:
    if "mean" in given["timestep_config"].get("params", {}):
        given["timestep_config"]["params"]["min_timestep"] = 1
    with pytest.raises(UserError, match=said):
        make_model(**given)
