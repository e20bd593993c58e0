"""What a frozen model is asked and says, and how little of it the stored values lose."""

import numpy as np
import pytest
import torch

from ldm.encoding.teacher import Teacher, stratified_timesteps
from ldm.release.load import load_release
from ldm.shards.sample import CONTEXT
from ldm.util import UserError
from tests.conftest import RELEASE_CONFIG


@pytest.fixture(scope="module")
def model(tiny_release):
    return load_release(tiny_release, RELEASE_CONFIG)


def asked(model, numbers, count=3, seed=5):
    """The answers about latents that depend on the number alone."""
    shape = (model.channels, 8, 8)
    latents = np.stack([np.random.default_rng(n).standard_normal(shape) for n in numbers]).astype(np.float16)
    context = (77, model.model.diffusion_model.context_dim)
    contexts = np.stack([np.random.default_rng(n).standard_normal(context) for n in numbers]).astype(np.float16)
    answers = Teacher(model, count, seed).answers(numbers, latents, {CONTEXT: contexts})
    return latents, contexts, answers


def test_each_part_of_the_schedule_is_asked_about():
    for seed in range(20):
        t = stratified_timesteps(np.random.default_rng(seed), 4, 1000)
        assert t.dtype == np.int32 and (t // 250).tolist() == [0, 1, 2, 3]
    everywhere = [stratified_timesteps(np.random.default_rng(seed), 2, 10) for seed in range(200)]
    assert {int(t) for ts in everywhere for t in ts} == set(range(10))
    assert stratified_timesteps(np.random.default_rng(0), 7, 7).tolist() == list(range(7))


def test_stratified_timesteps_of_a_falling_density_by_hand():
    """The cumulative distribution 1 − (1 − τ)² has its half at τ = 1 − √½ = 0.2929."""
    for seed in range(20):
        low, high = stratified_timesteps(np.random.default_rng(seed), 2, 1000, power=1.0)
        uniform = np.random.default_rng(seed).random(2)
        assert [low, high] == [int(1000 * (1 - (1 - (k + u) / 2) ** 0.5)) for k, u in enumerate(uniform)]
        assert low <= 292 < 293 <= high + 1
    assert stratified_timesteps(np.random.default_rng(0), 4, 10, power=1e9).max() <= 9


@pytest.mark.slow
def test_predictions_are_those_of_the_stored_values(model):
    latents, contexts, members = asked(model, [0, 1])
    for latent, context, sample in zip(latents, contexts, members, strict=True):
        assert sample["t"].shape == (3,) and sample["t"].dtype == np.int32
        assert sample["noise"].shape == sample["prediction"].shape == (3, model.channels, 8, 8)
        assert sample["noise"].dtype == sample["prediction"].dtype == np.float16
        for k, t in enumerate(sample["t"]):
            a = model.alphas_cumprod[t]
            x = a.sqrt() * model.scale_factor * torch.from_numpy(latent).float()
            x = x + (1 - a).sqrt() * torch.from_numpy(sample["noise"][k]).float()
            cond = torch.from_numpy(context)[None].float()
            output = model.apply_model(x[None], torch.tensor([t]), cond)[0]
            np.testing.assert_allclose(sample["prediction"][k], output, rtol=2e-3, atol=2e-3)


def test_questions_follow_from_seed_and_number(model):
    _, _, together = asked(model, [3, 4])
    _, _, (alone,) = asked(model, [4])
    _, _, (other,) = asked(model, [4], seed=6)
    for key in ("t", "noise"):
        assert np.array_equal(together[1][key], alone[key])
        assert not np.array_equal(together[0][key], alone[key]) and not np.array_equal(other[key], alone[key])


def test_half_precision_networks_are_asked_too(tiny_release):
    model = load_release(tiny_release, RELEASE_CONFIG, dtype=torch.bfloat16)
    _, _, (sample,) = asked(model, [0])
    assert np.isfinite(sample["prediction"]).all()


@pytest.mark.parametrize("count", [0, 1001])
def test_a_number_of_questions_that_cannot_be(model, count):
    with pytest.raises(UserError, match=f"--teacher {count}: must be 1 to 1000 timesteps"):
        Teacher(model, count, 0)


def test_predictions_that_do_not_fit_are_refused(model, monkeypatch):
    monkeypatch.setattr(model, "apply_model", lambda x, t, c: torch.full_like(x, 1e6))
    with pytest.raises(UserError, match="NaN or infinity"):
        asked(model, [0])
