"""Tests of the images that are logged during training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.golden_data import fill_seeded
from tests.ldm.models.diffusion.conftest import TEXT_TOWER, batch_of, construct


@pytest.mark.slow
def test_log_images_keep_the_random_state_of_weights(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(use_ema=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = model.log_images(batch_of((2, 8, 8, 8)), N=2, ddim_steps=5, plot_diffusion_rows=True)
    assert {"inputs", "reconstruction", "samples", "denoise_row", "diffusion_row"} == set(images)
    assert images["samples"].shape == (2, 3, 64, 64)
    assert images["denoise_row"].shape == (10, 3, 64, 64)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_images_are_of_the_average(make_model: Callable[..., LatentDiffusion]) -> None:
    batch = batch_of((2, 8, 8, 8))
    images = []
    for use_ema in (False, True):  # the average is of the weights before they were filled
        torch.manual_seed(0)
        model = make_model(use_ema=use_ema)
        torch.manual_seed(0)
        images.append(model.log_images(batch, ddim_steps=2, plot_denoise_rows=False)["samples"])
    assert not torch.equal(*images)


def test_guided_images_of_captions() -> None:
    model = construct(TEXT_TOWER, cond_stage_key="txt")
    fill_seeded(model)
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    images = model.log_images(batch, ddim_steps=2, plot_denoise_rows=False, unconditional_guidance_scale=9.0)
    assert not torch.allclose(images["samples_cfg_scale_9.00"], images["samples"], atol=0.01)


@pytest.mark.parametrize("kwargs", [{"N": 2, "use_ema_scope": False, "inpaint": False, "plot_progressive_rows": False}])
def test_image_settings_of_2022(model: LatentDiffusion, kwargs: dict) -> None:
    batch = batch_of((4, 8, 8, 8))
    assert model.log_images(batch, ddim_steps=2, **kwargs)["samples"].shape == (2, 3, 64, 64)


def test_log_images_leave_out_samples_that_are_not_finite(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training, which may recover or stop with a reason of its own, goes on."""
    monkeypatch.setattr(model, "apply_model", lambda x, t, cond: x * float("nan"))
    images = model.log_images(batch_of((2, 8, 8, 8)), ddim_steps=2)
    assert set(images) == {"inputs", "reconstruction"}
    assert "no samples are logged: DDIMSampler: the sample has NaN" in caplog.text
