"""The batch of a plan is as large as what the config's data would give."""

import pytest
from omegaconf import OmegaConf

from ldm.config.load import build_model
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.planning.fake_batch import gives_images, make_batch
from tests.training_runs import CONFIG


class OwnShards(WebDataNpyModuleFromConfig):
    """Somebody's shards."""


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
def test_the_class_tells_whether_data_are_pictures(target, images):
    config = OmegaConf.create(CONFIG)
    model = build_model(config)
    config.data.target = target
    assert gives_images(model, config) is images


@pytest.mark.parametrize(("levels", "pixels"), [([1, 1], 2), (None, 8)], ids=["as named", "by default"])
def test_the_first_stage_tells_how_large_a_picture_is(levels, pixels):
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
