"""Direct consistency, against values by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from ldm.models.diffusion.consistency import Consistency
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.preservation import Prior, StoredPredictions
from ldm.util import UserError
from tests.ldm.models.diffusion.conftest import batch_of

ModelFactory = Callable[..., LatentDiffusion]
CONFIG = {"loss_config": {"target": "ldm.models.diffusion.consistency.DirectConsistency", "params": {"beta": 0.5}}}


def filled(*values: float) -> torch.Tensor:
    """One value per sample."""
    return torch.tensor(values)[:, None, None, None].expand(len(values), 4, 8, 8)


def log_one_plus_exp(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_the_loss_by_hand(make_model: ModelFactory) -> None:
    """Targets 0; errors of the model 1 and 9, of the base 4 and 4: ln(1 + e^(β d)) with d = −3 and 5."""
    model = make_model(**CONFIG)
    samples = Consistency(StoredPredictions(torch.tensor([3, 5]), filled(0, 0), filled(2, -2)), 0.5)
    target = samples.target(torch.zeros(2, 4, 8, 8))
    loss, logged = model.training_loss(filled(1.0, 3.0), target, torch.tensor([3, 5]), samples)
    assert loss.item() == pytest.approx((log_one_plus_exp(-1.5) + log_one_plus_exp(2.5)) / 2)
    assert logged["train/loss_simple"].item() == pytest.approx(5)
    left = [1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-2.5))]
    assert logged["train/consistency"].item() == pytest.approx(sum(left) / 2)


def test_prior_samples_keep_their_loss(make_model: ModelFactory) -> None:
    """The second sample is of the prior, with λ = 2 and the error 9."""
    model, mask = make_model(**CONFIG), torch.tensor([False, True])
    stored = StoredPredictions(torch.tensor([3, 5]), filled(7, 7), filled(2, 0))
    samples = Consistency(stored, 0.5, Prior(mask, 2.0))
    t, noise = samples.timesteps_and_noise(torch.tensor([1, 1]), filled(0.0, 0.0))
    assert t.tolist() == [3, 1] and noise[:, 0, 0, 0].tolist() == [7, 0]
    loss, logged = model.training_loss(filled(1.0, 3.0), samples.target(torch.zeros(2, 4, 8, 8)), t, samples)
    assert loss.item() == pytest.approx(log_one_plus_exp(-1.5) + 2 * 9)
    assert logged["train/loss_prior"].item() == pytest.approx(9)


def test_the_base_has_the_loss_of_no_difference(make_model: ModelFactory) -> None:
    """With its own predictions, a model has ln 2 per sample, which a training step of the stored values gives."""
    model = make_model(**CONFIG)
    batch, t, noise = batch_of((2, 4, 8, 8)), torch.tensor([3, 8]), filled(0.5, -0.5).half()
    with torch.no_grad():
        x = model.q_sample(model.scale_factor * batch["f8"].float(), t, noise.float())
        batch |= {"t": t, "noise": noise, "prediction": model.apply_model(x, t, batch["t5"].float())}
        assert model.shared_step(batch)[0].item() == pytest.approx(math.log(2))
        del batch["prediction"]
        with pytest.raises(UserError, match="needs training samples with the base's predictions"):
            model.shared_step(batch)
        assert "val/consistency" not in model.eval().shared_step(batch)[1]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {
                "loss_config": {
                    "target": "ldm.models.diffusion.loss.MinSNR",
                    "params": {"weighting": CONFIG["loss_config"]},
                }
            },
            "DirectConsistency weights no other loss; name it as loss_config",
        ),
        ({"loss_type": "l1"}, "loss_type l1: DirectConsistency compares squared errors"),
        ({"num_timesteps_cond": 2}, "has predictions at stored timesteps and noises"),
        ({"timestep_config": {"target": "ldm.models.diffusion.timesteps.Split"}}, "leave out timestep_config"),
        ({"noise_config": {"target": "ldm.models.diffusion.noise.TrainingNoise"}}, "leave out .*noise_config"),
    ],
)
def test_what_cannot_be_combined_is_refused(make_model: ModelFactory, params: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model(**CONFIG | params)
