"""Tests of the fake batch, which has the shapes of the config's data."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config.load import build_model
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.planning.fake_batch import has_image_data, make_batch
from ldm.release.families import FAMILIES
from tests.narrow_models import OPEN_CLIP
from tests.tiny_families import tiny_config
from tests.tiny_training import finetune_config
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


@pytest.mark.parametrize("key", FAMILIES)
def test_the_batch_of_each_family_is_what_its_model_reads(key, tmp_path):
    """Pre-encoded samples as the finetune config reads them, and images as the release config does."""
    for config in map(OmegaConf.create, (tiny_config(key), finetune_config(key, tmp_path))):
        model = build_model(config).eval()
        batch = make_batch(model, config, images=2)
        assert len(batch[model.first_stage_key]) == 2
        with torch.no_grad():
            loss, _ = model.shared_step({name: _filled(value) for name, value in batch.items()})
        assert torch.isfinite(loss)
        if FAMILIES[key].has_vector and not has_image_data(model, config):
            assert batch["pooled"].shape == (2, OPEN_CLIP["embed_dim"])


def _filled(value):
    """Return the entry with numbers in place of whatever its memory holds."""
    if isinstance(value, dict):
        return {name: _filled(part) for name, part in value.items()}
    return torch.full_like(value, 0.5) if isinstance(value, torch.Tensor) else value


def test_the_batch_of_direct_consistency_has_predictions():
    config = OmegaConf.create(CONFIG)
    config.model.params.loss_config = {"target": "ldm.models.diffusion.consistency.DirectConsistency"}
    model = build_model(config)
    batch = make_batch(model, config)
    assert batch["prediction"].shape == batch["noise"].shape == (2, 4, 4, 4)
    loss, logged = model.shared_step({key: torch.zeros_like(value) for key, value in batch.items()})
    assert loss.isfinite() and "train/consistency" in logged
