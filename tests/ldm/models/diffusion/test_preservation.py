"""The loss of batches with prior samples, against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.preservation import Prior, StoredPredictions
from ldm.util import UserError
from tests.golden_data import seeded_tensor
from tests.ldm.models.diffusion.conftest import TEXT_TOWER, construct

MASK = torch.tensor([False, True, False, True])


def batch_of(**entries: torch.Tensor) -> dict[str, torch.Tensor]:
    f8, t5 = seeded_tensor("prior/f8", (4, 4, 8, 8)).half(), seeded_tensor("prior/t5", (4, 7, 64)).half()
    return {"f8": f8, "t5": t5, **entries}


def taught(model, t: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch with the predictions of `model` for its prior samples."""
    batch, t = batch_of(is_prior=MASK), torch.tensor(t)
    noise = seeded_tensor("prior/noise", (4, 4, 8, 8)).half()
    with torch.no_grad():
        x = model.q_sample(model.scale_factor * batch["f8"].float(), t, noise.float())
        prediction = model.apply_model(x, t, batch["t5"].float()).half()
    return {**batch, "t": t, "noise": noise, "prediction": prediction}


def test_the_loss_by_hand(model):
    """Errors 1 and 3 of the training samples, 2 and 6 of the prior's: 5 + 0.5 · 20 = 15."""
    errors = torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None, None, None].expand(4, 4, 8, 8)
    mask = torch.tensor([False, True, False, True])
    loss, logged = model.training_loss(errors, torch.zeros(4, 4, 8, 8), torch.arange(4), Prior(mask, 0.5))
    assert loss.item() == pytest.approx(15) and logged["train/loss"].item() == pytest.approx(15)
    assert logged["train/loss_simple"].item() == pytest.approx(5)
    assert logged["train/loss_prior"].item() == pytest.approx(20)


def test_the_variational_bound_joins_in_the_same_way(make_model):
    model = make_model(original_elbo_weight=2.0, l_simple_weight=0.0)
    errors, t = torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None, None, None].expand(4, 4, 8, 8), torch.tensor([0, 1, 5, 9])
    loss, logged = model.training_loss(errors, torch.zeros(4, 4, 8, 8), t, Prior(MASK, 0.5))
    weights = model.lvlb_weights[t]
    own, other = (weights[0] * 1 + weights[2] * 9) / 2, (weights[1] * 4 + weights[3] * 36) / 2
    torch.testing.assert_close(loss, 2 * (own + 0.5 * other))
    torch.testing.assert_close(logged["train/loss_vlb"], own)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_weights_of_timesteps_count_for_both_kinds(make_model, parameterization):
    """A learned log variance s and min-SNR weights w: w · error / eˢ + s, each kind's mean, the prior's times λ."""
    model = make_model(learn_logvar=True, min_snr_gamma=5, parameterization=parameterization)
    errors, t = torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None, None, None].expand(4, 4, 8, 8), torch.tensor([0, 1, 5, 9])
    loss, logged = model.training_loss(errors, torch.zeros(4, 4, 8, 8), t, Prior(MASK, 0.5))
    snr = model.alphas_cumprod[t] / (1 - model.alphas_cumprod[t])
    w = snr.clamp(max=5) / {"eps": snr, "x0": 1, "v": snr + 1}[parameterization]
    s = model.logvar.detach()[t]
    parts = w * torch.tensor([1.0, 4, 9, 36]) / s.exp() + s
    own = (parts[0] + parts[2]) / 2
    torch.testing.assert_close(loss.detach(), own + 0.5 * (parts[1] + parts[3]) / 2)
    torch.testing.assert_close(logged["train/loss_gamma"], own)
    assert logged["train/loss_simple"].item() == pytest.approx(5)
    loss.backward()
    assert model.logvar.grad.nonzero().flatten().tolist() == t.tolist()


def test_a_batch_without_a_prior_is_as_it_was(model, make_model):
    """The same draws, bit for bit, and nothing else logged."""
    losses = []
    for other in (model, make_model(prior_loss_weight=7.0, prior_target="teacher")):
        torch.manual_seed(1)
        losses.append(other.shared_step(batch_of())[1])
    assert losses[0] == losses[1] and "train/loss_prior" not in losses[0]


def test_a_prior_of_weight_0_leaves_the_loss_of_the_training_samples(make_model):
    model = make_model(prior_loss_weight=0.0)
    torch.manual_seed(1)
    loss, logged = model.shared_step(batch_of(is_prior=MASK))
    assert loss == logged["train/loss_simple"]


def test_the_teachers_questions_are_asked_again(make_model, monkeypatch):
    """x_t, t and target of the prior's rows are the stored ones; those of the others are drawn."""
    model, seen = make_model(prior_target="teacher"), []
    batch = taught(model, [3, 500, 7, 999])
    forward = model.apply_model
    monkeypatch.setattr(model, "apply_model", lambda x, t, c: seen.append((x, t)) or forward(x, t, c))
    torch.manual_seed(1)
    _, logged = model.shared_step(batch)
    (x, t) = seen[0]
    torch.manual_seed(1)
    drawn = model.sample_timesteps(batch["f8"])
    assert t.tolist() == torch.where(MASK, batch["t"], drawn).tolist()
    expected = model.q_sample(model.scale_factor * batch["f8"].float(), batch["t"], batch["noise"].float())
    assert torch.equal(x[MASK], expected[MASK]) and not torch.isclose(x[~MASK], expected[~MASK]).all()
    # An unchanged model is right, but for float16: half a unit in the last place of values about 1.
    assert logged["train/loss_prior"] < (2**-11) ** 2 * 4
    assert logged["train/loss_simple"] > 0.1


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_a_teacher_predicts_whatever_the_model_does(make_model, parameterization):
    model = make_model(prior_target="teacher", parameterization=parameterization)
    assert model.shared_step(taught(model, [3, 500, 7, 999]))[1]["train/loss_prior"] < 1e-5


def test_the_teachers_loss_by_hand(make_model, monkeypatch):
    """A model that says 0 where the teacher said 3 has the loss 9 there."""
    model = make_model(prior_target="teacher", prior_loss_weight=2.0)
    batch = {**taught(model, [3, 500, 7, 999]), "prediction": torch.full((4, 4, 8, 8), 3.0).half()}
    monkeypatch.setattr(model, "apply_model", lambda x, t, c: torch.zeros_like(x))
    loss, logged = model.shared_step(batch)
    assert logged["train/loss_prior"].item() == pytest.approx(9)
    assert loss.item() == pytest.approx(logged["train/loss_simple"].item() + 18)


def test_each_part_pulls_at_its_own_samples(model):
    """d/dy of the mean of (y - 1)² at y = 0: -2 over 256 values and 2 samples of a kind, and λ times that."""
    output = torch.zeros(4, 4, 8, 8, requires_grad=True)
    loss, _ = model.training_loss(output, torch.ones(4, 4, 8, 8), torch.arange(4), Prior(MASK, 0.5))
    loss.backward()
    expected = torch.where(MASK, 0.5, 1.0)[:, None, None, None] * (-2 / 256 / 2)
    torch.testing.assert_close(output.grad, expected.expand(4, 4, 8, 8))


@pytest.mark.parametrize("target", ["data", "teacher"])
def test_gradients_reach_the_unet_and_nothing_else(make_model, target):
    model = make_model(prior_target=target)
    batch = {**taught(model, [3, 500, 7, 999]), "is_prior": torch.ones(4, dtype=torch.bool)}
    model.shared_step(batch)[0].backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())
    assert all(parameter.grad is None for parameter in model.first_stage_model.parameters())
    assert not any(value.requires_grad for value in batch.values())


def test_a_frozen_text_tower_stays_so_and_a_trained_one_learns_from_the_prior():
    for trainable in (False, True):
        model = construct(TEXT_TOWER, cond_stage_trainable=trainable, cond_stage_key="txt")
        batch = {**batch_of(is_prior=torch.tensor([False, True, True, True])), "txt": ["a cat"] * 4}
        model.shared_step(batch)[0].backward()
        assert all((p.grad is not None) == trainable for p in model.cond_stage_model.parameters())


def test_rows_outside_the_prior_take_nothing_from_the_teacher():
    teacher = StoredPredictions(torch.full((4,), 9), torch.full((4, 1, 1, 1), 9.0), torch.full((4, 1, 1, 1), 9.0))
    prior = Prior(MASK, 1.0, teacher)
    t, noise = prior.timesteps_and_noise(torch.zeros(4, dtype=torch.long), torch.zeros(4, 1, 1, 1))
    assert t.tolist() == noise.flatten().tolist() == prior.target(torch.zeros(4, 1, 1, 1)).flatten().tolist()
    assert t.tolist() == [0, 9, 0, 9]


def test_a_batch_of_one_kind_alone():
    values = torch.tensor([1.0, 3.0])
    assert Prior(torch.zeros(2, dtype=torch.bool), 5.0).loss_mean(values) == 2
    assert Prior(torch.ones(2, dtype=torch.bool), 5.0).loss_mean(values) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_loss_weight": -1}, "prior_loss_weight -1"),
        ({"prior_target": "model"}, "prior_target 'model' is unknown; valid: data, teacher"),
        ({"prior_target": "teacher", "num_timesteps_cond": 2}, "num_timesteps_cond: 2 adds noise"),
    ],
)
def test_settings_that_cannot_be(make_model, changes, message):
    with pytest.raises(UserError, match=message):
        make_model(**changes)


def test_a_batch_without_predictions_is_named(make_model):
    with pytest.raises(UserError, match="the model reads the batch entry 't'"):
        make_model(prior_target="teacher").shared_step(batch_of(is_prior=MASK))
