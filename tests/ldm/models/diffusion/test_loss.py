"""Loss weightings by config, by their older keys, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError
from tests.ldm.models.diffusion.conftest import batch_of

ModelFactory = Callable[..., LatentDiffusion]
T = torch.tensor([3, 500, 7, 999])


def weighting(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.models.diffusion.loss.{name}", "params": params}


def losses(model: LatentDiffusion) -> tuple[float, dict[str, float], list[str]]:
    torch.manual_seed(0)
    loss, logged = model.shared_step(batch_of((2, 8, 8, 8)))
    return loss.item(), {key: value.item() for key, value in logged.items()}, list(model.state_dict())


@pytest.mark.parametrize(
    ("older", "config"),
    [
        ({}, weighting("Unweighted")),
        ({"min_snr_gamma": 5}, weighting("MinSNR", gamma=5)),
        ({"learn_logvar": True, "logvar_init": 0.3}, weighting("LogVariance", init=0.3)),
        ({"logvar_init": 0.3}, weighting("LogVariance", init=0.3, learn=False)),
        ({"original_elbo_weight": 0.7, "l_simple_weight": 0.3}, weighting("VariationalBound", elbo=0.7, simple=0.3)),
        (
            {"original_elbo_weight": 0.7, "learn_logvar": True, "min_snr_gamma": 1},
            weighting(
                "VariationalBound", elbo=0.7, weighting=weighting("LogVariance", weighting=weighting("MinSNR", gamma=1))
            ),
        ),
    ],
)
def test_loss_config_is_what_the_older_keys_say(make_model: ModelFactory, older: dict, config: dict) -> None:
    assert losses(make_model(**older)) == losses(make_model(loss_config=config))


def test_variational_bound_by_hand(make_model: ModelFactory) -> None:
    """Errors 1, 4, 9 and 16: 0.3 of their mean, and 0.7 of the mean of the weighted ones."""
    model = make_model(loss_config=weighting("VariationalBound", elbo=0.7, simple=0.3))
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None].expand(4, 4, 8, 8)
    loss, logged = model.training_loss(errors, torch.zeros(4, 4, 8, 8), T)
    bound = (model.lvlb_weights[T] * torch.tensor([1.0, 4, 9, 16])).mean()
    assert loss.item() == pytest.approx(0.3 * 7.5 + 0.7 * bound.item(), rel=1e-5)
    assert logged["train/loss_vlb"].item() == pytest.approx(bound.item(), rel=1e-5)


def test_logvar_keeps_its_key_and_is_trained(make_model: ModelFactory) -> None:
    model = make_model(loss_config=weighting("LogVariance"))
    assert "logvar" in model.state_dict() and model.trained_parameters()[-1] is model.logvar
    assert "logvar" not in make_model(loss_config=weighting("LogVariance", learn=False)).state_dict()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"loss_config": weighting("MinSNR"), "min_snr_gamma": 5}, "min_snr_gamma and loss_config both"),
        ({"loss_config": weighting("MinSNR", gamma=0)}, "min_snr_gamma 0: give a number above 0"),
        (
            {"loss_config": {"target": "torch.nn.Identity"}},
            "Identity is not a loss weighting; .* has Unweighted, MinSNR",
        ),
        ({"loss_config": weighting("MinSNR", gama=5)}, "unknown key 'gama'.*'gamma'"),
    ],
)
def test_loss_config_that_cannot_be(make_model: ModelFactory, params: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_model(**params)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("older", [{"min_snr_gamma": 5}, {"original_elbo_weight": 0.1}])
def test_weights_are_finite_at_zero_terminal_snr(make_model: ModelFactory, parameterization: str, older: dict) -> None:
    model = make_model(rescale_betas_zero_snr=True, parameterization=parameterization, **older)
    loss, _ = model.training_loss(torch.ones(4, 4, 8, 8), torch.zeros(4, 4, 8, 8), T)
    assert torch.isfinite(loss)
