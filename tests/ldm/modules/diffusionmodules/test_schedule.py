"""Noise schedules against the golden cases, and the closed forms against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.modules.diffusionmodules.schedule import (
    GaussianDiffusion,
    diffusion_buffers,
    make_beta_schedule,
    prediction_to_eps_x0,
    snr_weights,
    vlb_weights,
)
from ldm.util import UserError
from tests.golden_data import case, cases, relative_error, seeded_tensor, tensors


@pytest.mark.parametrize("name", cases("beta_schedule"))
def test_golden_betas(name: str) -> None:
    betas = make_beta_schedule(**case(name)["params"])
    assert betas.dtype == np.float64
    assert relative_error(torch.from_numpy(betas), tensors("cases")[f"{name}/betas"]) < 1e-12


def test_unknown_schedule_names_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"'cosin'.*'cosine'"):
        make_beta_schedule("cosin", 10)


def test_posterior_variance_blends_both_bounds() -> None:
    betas = make_beta_schedule("linear", 100)
    low, high = (diffusion_buffers(betas, v)["posterior_variance"] for v in (0.0, 1.0))
    np.testing.assert_allclose(high, betas)
    np.testing.assert_allclose(diffusion_buffers(betas, 0.25)["posterior_variance"], 0.75 * low + 0.25 * high)
    assert low[0] == 0


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_prediction_and_what_it_implies(parameterization: str) -> None:
    x0, eps = seeded_tensor("schedule/x0", (2, 3)).double(), seeded_tensor("schedule/eps", (2, 3)).double()
    alpha_bar = torch.tensor(0.3).double()
    x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    prediction = {"eps": eps, "x0": x0, "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0}[parameterization]
    for implied, true in zip(prediction_to_eps_x0(prediction, x, alpha_bar, parameterization), (eps, x0), strict=True):
        torch.testing.assert_close(implied, true)


def test_bound_weights() -> None:
    buffers = diffusion_buffers(make_beta_schedule("linear", 10))
    assert (vlb_weights(buffers, "v") == 1).all()
    x0 = vlb_weights(buffers, "x0")
    assert x0[5] == pytest.approx(0.5 * buffers["alphas_cumprod"][5] ** 0.5 / (2 - buffers["alphas_cumprod"][5]))
    assert x0[0] == x0[1]
    assert np.isfinite(vlb_weights(buffers, "eps")).all()


def test_bound_weights_are_of_the_stored_float32_values() -> None:
    """1 − ᾱ of the first steps loses digits in float32, and the published weights hold that loss."""
    buffers = diffusion_buffers(make_beta_schedule("linear", 1000))
    stored = {name: torch.tensor(values, dtype=torch.float32) for name, values in buffers.items()}
    alphas = torch.tensor(1 - buffers["betas"], dtype=torch.float32)
    bound = stored["betas"] ** 2 / (2 * stored["posterior_variance"] * alphas * (1 - stored["alphas_cumprod"]))
    assert relative_error(torch.from_numpy(vlb_weights(buffers, "eps"))[1:], bound[1:]) < 1e-6


@pytest.mark.parametrize("betas", [[], [0.1, 1.0], [0.0]])
def test_impossible_betas(betas: list[float]) -> None:
    module = type("Diffusion", (GaussianDiffusion, torch.nn.Module), {"parameterization": "eps", "v_posterior": 0.0})()
    with pytest.raises(UserError, match="between 0 and 1"):
        module.register_schedule(given_betas=betas)


def test_snr_weights_are_of_the_error_of_the_clean_image() -> None:
    def bounded(snr: torch.Tensor) -> torch.Tensor:
        return snr.clamp(max=5.0)

    alphas_cumprod = torch.tensor([0.9, 0.5, 0.2])  # SNR 9, 1, 0.25
    assert snr_weights(alphas_cumprod, bounded, "eps").tolist() == pytest.approx([5 / 9, 1, 1])
    assert snr_weights(alphas_cumprod, bounded, "x0").tolist() == pytest.approx([5, 1, 0.25])
    assert snr_weights(alphas_cumprod, bounded, "v").tolist() == pytest.approx([0.5, 0.5, 0.2])
