"""Latent diffusion against the golden cases: buffers, losses and a short training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError
from tests.golden_data import case, cases, relative_error, seeded_tensor, tensors
from tests.ldm.models.diffusion.conftest import build

ModelFactory = Callable[..., LatentDiffusion]


@pytest.mark.parametrize("name", cases("ddpm_buffers"))
def test_golden_buffers(name: str) -> None:
    spec = case(name)
    model = build(spec["params"])
    expected = {key.split("/")[1]: value for key, value in tensors("cases").items() if key.startswith(f"{name}/")}
    for buffer, value in expected.items():
        assert relative_error(getattr(model, buffer), value) < 1e-5, buffer
    own = [key for key in model.state_dict() if "." not in key]
    assert own == spec["persistent"]


@pytest.mark.parametrize("name", cases("p_losses"))
def test_golden_losses(name: str) -> None:
    spec = case(name)
    model = build(spec["params"])
    shape = (spec["batch"], 4, 8, 8)
    x_start, noise = seeded_tensor(f"{name}/x_start", shape), seeded_tensor(f"{name}/noise", shape)
    context, t = seeded_tensor(f"{name}/context", (spec["batch"], 7, 64)), torch.tensor(spec["t"])
    assert relative_error(model.q_sample(x_start, t, noise), tensors("cases")[f"{name}/x_noisy"]) < 1e-5
    loss, logged = model.p_losses(x_start, context, t, noise=noise)
    assert loss.item() == pytest.approx(spec["loss"], rel=1e-5)
    assert {key: value.item() for key, value in logged.items()} == pytest.approx(spec["loss_dict"], rel=1e-5)


@pytest.mark.parametrize("name", cases("train"))
def test_golden_training(name: str, model: LatentDiffusion) -> None:
    spec = case(name)
    model.learning_rate = spec["lr"]
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    shape = (spec["batch"], 4, 8, 8)
    losses = []
    for step in range(spec["steps"]):
        t = torch.from_numpy(np.random.default_rng(step).integers(0, 1000, size=spec["batch"]))
        loss, _ = model.p_losses(
            seeded_tensor(f"{name}/{step}/x_start", shape),
            seeded_tensor(f"{name}/{step}/context", (spec["batch"], 7, 64)),
            t,
            noise=seeded_tensor(f"{name}/{step}/noise", shape),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(spec["losses"], rel=1e-4)
    final = model.state_dict()[spec["final_weight_key"]]
    assert relative_error(final, tensors("cases")[f"{name}/out_weight"]) < 1e-4


def test_min_snr_weights_the_loss_and_not_what_is_logged_as_simple() -> None:
    params = case("loss_eps")["params"]
    plain, weighted = build(params), build({**params, "min_snr_gamma": 1})
    t = torch.tensor([10, 700])
    x_start, noise = seeded_tensor("x", (2, 4, 8, 8)), seeded_tensor("noise", (2, 4, 8, 8))
    context = seeded_tensor("context", (2, 7, 64))
    errors = [plain.p_losses(x_start[i : i + 1], context[i : i + 1], t[i : i + 1], noise[i : i + 1])[0] for i in (0, 1)]
    loss, logged = weighted.p_losses(x_start, context, t, noise)
    snr = (plain.alphas_cumprod / (1 - plain.alphas_cumprod))[t]
    assert snr[0] > 1 > snr[1]
    assert loss.item() == pytest.approx((errors[0] / snr[0] + errors[1]).item() / 2, rel=1e-5)
    assert logged["train/loss_simple"].item() == pytest.approx((errors[0] + errors[1]).item() / 2, rel=1e-5)
    assert weighted.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("gamma", [0, -1])
def test_impossible_min_snr(gamma: float) -> None:
    with pytest.raises(UserError, match="min_snr_gamma"):
        build({**case("loss_eps")["params"], "min_snr_gamma": gamma})
