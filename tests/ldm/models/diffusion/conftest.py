"""The models of the golden cases of training and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config
from tests.golden_data import case, fill_seeded


def build(params: dict[str, Any]) -> LatentDiffusion:
    """A LatentDiffusion of `params` over the tiny UNet and autoencoder, with seeded weights."""
    params = dict(params)
    unet = params.pop("unet", case("unet_sd_tiny")["params"])
    torch.manual_seed(0)
    model = instantiate_from_config(
        {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                **params,
                "unet_config": {"target": case("unet_sd_tiny")["target"], "params": unet},
                "first_stage_config": {"target": case("vae_tiny")["target"], "params": case("vae_tiny")["params"]},
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.DummyEncoder",
                    "params": {"key": "t5"},
                },
            },
        }
    )
    return fill_seeded(model)


@pytest.fixture
def make_model() -> Callable[..., LatentDiffusion]:
    """Builds the golden model; keyword arguments change its params."""
    return lambda **changes: build({**case("loss_eps")["params"], **changes})


@pytest.fixture
def model(make_model: Callable[..., LatentDiffusion]) -> LatentDiffusion:
    return make_model()
