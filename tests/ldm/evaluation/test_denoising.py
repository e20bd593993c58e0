"""Tests of losses and drift at fixed timesteps and noise: by hand, and independent of batches and random state."""

import copy

import numpy as np
import pytest
import torch

from ldm.evaluation.denoising import compare, record
from ldm.evaluation.protocol import fixed_noise
from ldm.evaluation.sets import open_set
from ldm.shards import npy
from tests.golden_data import fill_seeded, seeded_tensor
from tests.ldm.evaluation.conftest import KEYS, constant, members
from tests.ldm.shard_files import write_tar

TIMESTEPS = [6, 18, 31, 43]


def moved(model, amount):
    """Return a copy of `model` whose UNet is moved by `amount` along one fixed direction."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in other.model.named_parameters():
            parameter += amount * seeded_tensor(f"direction {key}", tuple(parameter.shape)) * parameter.abs().mean()
    return other


def test_loss_and_drift_by_hand(five, model):
    base = record(constant(model, 1.0), five, TIMESTEPS, 2)
    found = compare(base, constant(model, 1.1), five, TIMESTEPS, 3)
    noise = [[fixed_noise(key, t, (4, 4, 4)).double() for t in TIMESTEPS] for key in KEYS]
    for value, losses in ((1.0, found.base), (1.1, found.tuned)):
        expected = [[float((value - eps).square().mean()) for eps in row] for row in noise]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(found.drift, np.full((5, 4), 0.01), rtol=1e-5)  # (1.1 - 1)² / 1²


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_drift_compares_noise_predictions_for_every_parameterization(five, make_model, parameterization):
    model = make_model(use_ema=False, parameterization=parameterization)
    base = record(constant(model, 0.5), five, TIMESTEPS, 5)
    drift = compare(base, constant(model, 0.6), five, TIMESTEPS, 5).drift
    for position, key in enumerate(KEYS):
        mean = torch.from_numpy(five[position]["f8"][:4]).double() * 0.18215
        for step, t in enumerate(TIMESTEPS):
            alpha = float(model.alphas_cumprod[t]) ** 0.5
            sigma = float(1 - model.alphas_cumprod[t]) ** 0.5
            x = alpha * mean + sigma * fixed_noise(key, t, (4, 4, 4)).double()
            eps = {"v": alpha * 0.5 + sigma * x, "x0": (x - alpha * 0.5) / sigma}[parameterization]
            change = {"v": alpha * 0.1, "x0": alpha * 0.1 / sigma}[parameterization]
            expected = 64 * change**2 / float(eps.square().sum())
            assert drift[position, step] == pytest.approx(expected, rel=1e-3)


def test_the_real_network_sees_the_noisy_mode_and_the_stored_encoding(five, model):
    found = record(model, five, TIMESTEPS, 2)
    sample, t = five[2], 18
    latent = torch.from_numpy(sample["f8"][:4]).float()[None] * model.scale_factor
    noise, times = fixed_noise("c", t, (4, 4, 4))[None], torch.tensor([t])
    with torch.no_grad():
        context = torch.from_numpy(sample["t5"]).float()[None]
        eps = model.apply_model(model.q_sample(latent, times, noise), times, context)
    torch.testing.assert_close(found.eps[2][1], eps[0], rtol=1e-4, atol=1e-5)
    assert found.loss[2, 1] == pytest.approx(float((eps - noise).square().mean()), rel=1e-4)


def test_a_model_has_no_drift_from_itself(five, model):
    found = compare(record(model, five, TIMESTEPS, 2), model, five, TIMESTEPS, 2)
    assert (found.drift == 0).all() and (found.base == found.tuned).all()


def test_models_of_known_drift_are_in_order(five, model):
    base = record(model, five, TIMESTEPS, 5)
    drifts = [compare(base, moved(model, amount), five, TIMESTEPS, 5).drift for amount in (0.01, 0.03, 0.1)]
    assert (drifts[0].mean(0) > 0).all()
    assert (drifts[0].mean(0) < drifts[1].mean(0)).all() and (drifts[1].mean(0) < drifts[2].mean(0)).all()
    assert drifts[1].mean() / drifts[0].mean() == pytest.approx(9, rel=0.3), "drift is quadratic in a small step"


def test_results_do_not_depend_on_batches_order_or_random_state(tmp_path, five, model):
    reversed_order = write_tar(tmp_path / "reversed.tar", [member for key in KEYS[::-1] for member in members(key)])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = record(model, five, TIMESTEPS, 5)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(4)
    for image_set, batch_size in ((five, 1), (five, 2), (open_set("reversed", str(reversed_order), model), 5)):
        other = record(model, image_set, TIMESTEPS, batch_size)
        order = [image_set.keys.index(key) for key in KEYS]
        np.testing.assert_allclose(other.loss[order], one.loss, rtol=1e-5)
        for position, eps in zip(order, one.eps, strict=True):
            torch.testing.assert_close(other.eps[position], eps, rtol=1e-4, atol=1e-5)


def test_a_stored_latent_is_used_unchanged(tmp_path, model):
    posterior = members("a")
    mode = seeded_tensor("a.f8", (8, 4, 4)).half().numpy()[:4]
    path = write_tar(tmp_path / "latent.tar", [("a.f8.npy", npy.encode(mode)), *posterior[1:]])
    other = write_tar(tmp_path / "posterior.tar", posterior)
    one, two = (record(model, open_set("s", str(p), model), TIMESTEPS, 1).loss for p in (path, other))
    assert (one == two).all()


def test_each_model_reads_captions_with_its_own_encoder(tmp_path, shard, reader):
    image_set = open_set("five", str(shard), reader)
    base = record(reader, image_set, TIMESTEPS, 5)
    tuned = copy.deepcopy(reader)
    fill_seeded(tuned.cond_stage_model, "another.")
    assert compare(base, tuned, image_set, TIMESTEPS, 5).drift.mean() > 0
    same_captions = write_tar(
        tmp_path / "same-captions.tar", [member for key in KEYS for member in members(key, caption="x")]
    )
    loss = record(reader, open_set("five", str(same_captions), reader), TIMESTEPS, 5).loss
    assert (loss != base.loss).all(), "captions change the loss"


def test_averaged_weights_are_evaluated_if_the_model_has_them(five, make_model):
    averaged = make_model(use_ema=True)
    averaged.restart_ema()
    expected = record(averaged, five, TIMESTEPS, 5).loss
    before = [parameter.detach().clone() for parameter in averaged.model.parameters()]
    with torch.no_grad():
        for parameter in averaged.model.parameters():
            parameter.mul_(1.5)
    assert (record(averaged, five, TIMESTEPS, 5).loss == expected).all()
    after = averaged.model.parameters()
    assert all(torch.equal(new, 1.5 * old) for new, old in zip(after, before, strict=True))
