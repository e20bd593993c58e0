"""Loss weightings by config, by their older keys, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError, instantiate_from_config
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


SNR = torch.tensor([9.0, 1.0, 0.25])


@pytest.mark.parametrize(
    ("name", "params", "of_eps"),
    [
        ("MinSNR", {"gamma": 5}, [5 / 9, 1, 1]),
        ("SoftMinSNR", {"gamma": 4}, [4 / 13, 4 / 5, 16 / 17]),  # γ / (SNR + γ)
        ("Debiased", {}, [1 / 3, 1, 2]),  # 1 / √SNR
        ("P2", {"gamma": 0.5}, [10**-0.5, 2**-0.5, 1.25**-0.5]),
    ],
)
def test_weights_by_snr_by_hand(name: str, params: dict, of_eps: list[float]) -> None:
    """Weights of the error of ε. Those of x₀ are SNR times as large, and those of v SNR / (SNR + 1) times."""
    for parameterization, factor in (("eps", torch.ones(3)), ("x0", SNR), ("v", SNR / (SNR + 1))):
        model = SimpleNamespace(alphas_cumprod=SNR / (1 + SNR), parameterization=parameterization)
        model.register_buffer = lambda name, tensor, persistent, model=model: setattr(model, name, tensor)
        kind = instantiate_from_config(weighting(name, **params))
        kind.attach(model)
        (factor_of_mean, values), *_ = kind.terms(model, torch.tensor([2.0, 2, 2]), torch.arange(3))
        assert factor_of_mean == 1.0
        assert values.tolist() == pytest.approx((2 * torch.tensor(of_eps) * factor).tolist(), rel=1e-5)


@pytest.mark.parametrize(("schedule", "c"), [("constant", 0.5), ("exponential", 0.5), ("snr", 0.5 + 0.5 / 9)])
def test_huber_by_hand(make_model: ModelFactory, schedule: str, c: float) -> None:
    """2c (√(d² + c²) − c), at the last timestep; σ is 2 there."""
    model = make_model(loss_config=weighting("Huber", c=0.5, schedule=schedule), given_betas=[0.5, 0.6])
    assert model.alphas_cumprod[1].item() == pytest.approx(0.2)
    assert model.huber_c[1].item() == pytest.approx(c)
    assert model.huber_c[0].item() == pytest.approx({"constant": 0.5, "exponential": 1.0}.get(schedule, 0.5 + 0.5 / 4))
    loss, _ = model.training_loss(torch.full((1, 4, 8, 8), 3.0), torch.zeros(1, 4, 8, 8), torch.tensor([1]))
    assert loss.item() == pytest.approx(2 * c * ((9 + c * c) ** 0.5 - c), rel=1e-5)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"loss_config": weighting("Huber"), "loss_type": "l1"}, "loss_type l1 and loss_config: Huber both"),
        ({"loss_config": weighting("Huber", schedule="linear")}, "schedule 'linear' is unknown"),
        ({"loss_config": weighting("P2", weighting=weighting("MinSNR"))}, "P2 wraps another weighting by SNR"),
        ({"loss_config": weighting("P2", k=0)}, "k 0: give a number above 0"),
        (
            {"loss_config": weighting("Debiased"), "rescale_betas_zero_snr": True, "parameterization": "eps"},
            "Debiased is infinite for eps at zero terminal SNR",
        ),
    ],
)
def test_losses_that_cannot_be(make_model: ModelFactory, params: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_model(**params)


@pytest.mark.parametrize("zero_snr", [True, False])
def test_weights_of_0_at_the_last_timestep_are_said(
    make_model: ModelFactory, caplog: pytest.LogCaptureFixture, zero_snr: bool
) -> None:
    for name in ("MinSNR", "SoftMinSNR", "Debiased", "P2"):
        caplog.clear()
        model = make_model(loss_config=weighting(name), rescale_betas_zero_snr=zero_snr, parameterization="v")
        assert (model.snr_weights[-1].item() == 0) == zero_snr == ("pure noise, weight 0" in caplog.text)


def test_l1_is_the_mean_absolute_error(make_model: ModelFactory) -> None:
    model = make_model(loss_type="l1", loss_config=weighting("MinSNR", gamma=5))
    loss, logged = model.training_loss(torch.full((4, 4, 8, 8), -3.0), torch.zeros(4, 4, 8, 8), T)
    assert logged["train/loss_simple"].item() == pytest.approx(3.0)
    assert loss.item() == pytest.approx(3.0 * model.snr_weights[T].mean().item())
