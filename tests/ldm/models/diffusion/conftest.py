"""The models of the golden cases of training and sampling, and what they train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config
from tests.golden_data import case, fill_seeded, seeded_tensor

TEXT_TOWER = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 64,
        }
    },
}


def assemble(params: dict[str, Any], cond_stage: dict | str) -> LatentDiffusion:
    """Return a LatentDiffusion of `params` with the tiny autoencoder, and the tiny UNet or that of `params['unet']`."""
    params = dict(params)
    unet = params.pop("unet", case("unet_sd_tiny")["params"])
    stages = {
        "unet_config": {"target": case("unet_sd_tiny")["target"], "params": unet},
        "first_stage_config": {"target": case("vae_tiny")["target"], "params": case("vae_tiny")["params"]},
        "cond_stage_config": cond_stage,
    }
    torch.manual_seed(0)
    return instantiate_from_config(
        {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**stages, **params}}
    )


def build(params: dict[str, Any]) -> LatentDiffusion:
    """That of stored encodings, with seeded weights."""
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    return fill_seeded(assemble(params, dummy))


def construct(cond_stage: dict | str, **changes: object) -> LatentDiffusion:
    """That of another conditioning, with weights as they are when training begins."""
    return assemble({**case("loss_eps")["params"], **changes}, cond_stage)


def batch_of(f8: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Two samples of what shards hold."""
    return {"f8": seeded_tensor("latent/f8", f8).half(), "t5": seeded_tensor("latent/t5", (2, 7, 64)).half()}


@pytest.fixture
def make_model() -> Callable[..., LatentDiffusion]:
    """Builds the golden model; keyword arguments change its params."""
    return lambda **changes: build({**case("loss_eps")["params"], **changes})


@pytest.fixture
def model(make_model: Callable[..., LatentDiffusion]) -> LatentDiffusion:
    return make_model()
