"""Tests of the fake batch, which has the shapes of the config's data."""

import pytest
from omegaconf import OmegaConf

from ldm.config.load import build_model
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.planning.fake_batch import has_image_data, make_batch
from tests.training_runs import CONFIG


class OwnShards(WebDataNpyModuleFromConfig):
    """Subclass in a user's module."""


@pytest.mark.parametrize(
    ("target", "images"),
    [
        ("main.WebDataNpyModuleFromConfig", False),
        ("ldm.data.datamodule.WebDataNpyModuleFromConfig", False),
        (f"{__name__}.OwnShards", False),
        ("main.DataModuleFromConfig", True),
        (None, True),
    ],
)
def test_has_image_data_follows_from_the_class(target, images):
    config = OmegaConf.create(CONFIG)
    model = build_model(config)
    config.data.target = target
    assert has_image_data(model, config) is images


@pytest.mark.parametrize(("levels", "pixels"), [([1, 1], 2), (None, 8)], ids=["as named", "by default"])
def test_the_image_size_follows_from_the_first_stage(levels, pixels):
    config = OmegaConf.create(CONFIG)
    config.data.target = "main.DataModuleFromConfig"
    described = config.model.params.first_stage_config.params.ddconfig
    described.pop("ch_mult")
    if levels:
        described.ch_mult = levels
    model = build_model(config)
    assert make_batch(model, config, images=1)["f8"].shape == (1, 4 * pixels, 4 * pixels, 3)
    batch = make_batch(model, config, images=1, size=64)
    assert model.encode_batch(batch).mean.shape == (1, 4, 64 // pixels, 64 // pixels)
