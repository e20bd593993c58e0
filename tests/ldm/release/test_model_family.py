"""Families of models by their parts."""

from __future__ import annotations

import pytest
import torch

from ldm.config.load import build_model, load_config
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.release.initialisation import without_initialisation
from ldm.release.model_family import own_side


def built(config: str, *changes: str) -> LatentDiffusion:
    """The model of `config` on the meta device."""
    with torch.device("meta"), without_initialisation(on_meta=True):
        return build_model(load_config([config], [f"model.params.{change}" for change in changes]))


@pytest.mark.parametrize(
    ("config", "changes", "side"),
    [
        ("stable_diffusion_v2_768_v.yaml", (), 768),
        ("stable_diffusion_v2_768_v.yaml", ("image_size=64",), 768),  # as the released v2-inference-v.yaml has it
        ("stable_diffusion_v2_768_v.yaml", ("image_size=32",), 256),
        ("stable_diffusion_v2_base.yaml", (), 512),
        ("stable_diffusion_v2_base.yaml", ("parameterization=x0",), 512),
    ],
)
def test_own_side_is_of_the_config_or_of_the_family(config: str, changes: tuple[str, ...], side: int) -> None:
    assert own_side(built(config, *changes)) == side
