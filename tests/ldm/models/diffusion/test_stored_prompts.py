"""Stored prompts make the images of the release that encoded them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_into, load_state_dict, save_state_dict
from ldm.config.load import build_model, load_config
from ldm.models.diffusion.stored_prompts import StoredPrompts
from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
from ldm.release.load import load_release
from ldm.release.text_encoder import load_text_encoder
from ldm.util import UserError
from tests.tiny_families import write_tiny
from tests.tiny_training import finetune_config

REQUEST = Request("red apple", 1, "a dog")


@pytest.mark.parametrize("key", ["sd1", "sd2_768_v", "sdxl"])
def test_stored_prompts_make_the_images_of_the_release(key: str, tmp_path: Path) -> None:
    path, config = write_tiny(key, tmp_path)
    stage, digests = load_text_encoder(path, load_config([config]))
    StoredPrompts.encoded(stage, ["red apple", "a dog", ""], str(path), digests).save(tmp_path / "p.safetensors")
    stored = StoredPrompts.load(tmp_path / "p.safetensors")
    assert stored.digests == digests and len(digests) == (1 if key == "sd1" else 2)
    model = build_model(OmegaConf.create(finetune_config(key, "none"))).eval()
    load_into(model, load_state_dict(path))
    model.restart_ema()
    release, shape = load_release(path, config), latent_shape(model, 32, 64)
    settings = {"steps": 2, "scale": 3.0, "verbose": False}
    for request in (REQUEST, Request("red apple", 2)):
        [expected] = text_to_image(release, [request], shape, **settings)
        [found] = text_to_image(model, [request], shape, captions=stored.encodings, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


ONE = torch.ones(2)
ABOUT = {"texts": ["a", "b"], "release": "r", "digests": {}}


@pytest.mark.parametrize(
    ("about", "tensors"),
    [
        ({"taxts": ["a", "b"]}, {}),
        ({"texts": ["a", 5]}, {}),
        ({"release": None}, {}),
        ({"digests": ["text_tower"]}, {}),
        ({"digests": {"text_tower": 5}}, {}),
        ({"max_tokens": "150"}, {}),
        ({"clip_skip": None}, {}),
        ({}, {"1.t5": torch.tensor([1.0, torch.nan])}),
        ({}, {"1.t5": torch.ones(3)}),
        ({}, {"1.pooled": ONE}),
        ({}, {"2.t5": ONE}),
    ],
)
def test_a_damaged_file_of_prompts_is_refused(tmp_path: Path, about: dict, tensors: dict) -> None:
    path = tmp_path / "p.safetensors"
    StoredPrompts({"a": {"t5": ONE}, "b": {"t5": ONE}}, "r").save(path)
    assert StoredPrompts.load(path).encodings["a"]["t5"].tolist() == [1, 1]
    about = {key: value for key, value in ABOUT.items() if "taxts" not in about or key != "texts"} | about
    save_state_dict({"0.t5": ONE, "1.t5": ONE, **tensors}, path, metadata={"prompts": json.dumps(about)})
    with pytest.raises(UserError, match="not a file of encoded prompts, or damaged; remove it"):
        StoredPrompts.load(path)
