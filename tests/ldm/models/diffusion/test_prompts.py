"""Conditioning by prompts: batches, negatives, maps, and the sizes and the zeros of SDXL."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.prompts import PromptConditioning, image_sizes
from ldm.modules.diffusionmodules.layers import timestep_embedding
from ldm.release.load import load_release
from ldm.util import UserError
from tests.tiny_families import write_tiny

PROMPTS = ["red apple", "a dog"]
POOLED = 24  # features of the pooled caption in the tiny model


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return load_release(*write_tiny("sdxl", tmp_path_factory.mktemp("xl")))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    return load_release(*write_tiny("sd1", tmp_path_factory.mktemp("sd1")))


def test_image_sizes_default_to_those_of_the_image(xl: LatentDiffusion, sd1: LatentDiffusion) -> None:
    sizes = image_sizes(xl, {}, 64, 96)
    assert sizes == {"original_size": (64, 96), "crop_top_left": (0, 0), "target_size": (64, 96)}
    assert image_sizes(xl, {"crop_top_left": [8, 0]}, 64, 96) == {**sizes, "crop_top_left": (8, 0)}
    assert image_sizes(sd1, {}, 64, 96) == {}
    with pytest.raises(UserError, match="--original-size, --crop and --target-size: this model is not conditioned"):
        image_sizes(sd1, {"crop_top_left": (8, 0)}, 64, 96)


def test_sdxl_is_conditioned_on_both_towers_the_pooled_vector_and_the_sizes(xl: LatentDiffusion) -> None:
    sizes = {"original_size": (50, 60), "crop_top_left": (7, 8), "target_size": (64, 96)}
    cond = PromptConditioning(xl, sizes).of(PROMPTS)
    clip, open_clip = (embedder(PROMPTS) for embedder in xl.cond_stage_model.embedders[:2])
    torch.testing.assert_close(cond["c_crossattn"][0], torch.cat([clip, open_clip[0]], dim=2))
    numbers = timestep_embedding(torch.tensor([50.0, 60, 7, 8, 64, 96]), 8).flatten()
    torch.testing.assert_close(cond["c_adm"], torch.cat([open_clip[1], numbers.expand(2, -1)], dim=1))


def test_an_empty_negative_prompt_of_sdxl_is_zeros_with_the_same_sizes(xl: LatentDiffusion) -> None:
    """As in its released sampling, which forces zeros for `txt`; another negative prompt is encoded."""
    conditioning = PromptConditioning(xl, image_sizes(xl, {}, 64, 64))
    negative, positive = conditioning.of_negatives(["", "a dog"]), conditioning.of(PROMPTS)
    assert not negative["c_crossattn"][0][0].any() and not negative["c_adm"][0, :POOLED].any()
    torch.testing.assert_close(negative["c_adm"][0, POOLED:], positive["c_adm"][0, POOLED:])
    torch.testing.assert_close(negative["c_crossattn"][0][1], positive["c_crossattn"][0][1])
    torch.testing.assert_close(negative["c_adm"][1], positive["c_adm"][1])
    forced, _ = xl.cond_stage_model.get_unconditional_conditioning(
        {"txt": ["a dog"], **{key: torch.tensor([[64, 64]]) for key in xl.cond_stage_model.other_keys}},
        force_cond_zero_embeddings=["txt"],
    )
    assert torch.equal(negative["c_crossattn"][0][:1], forced["crossattn"])


def test_an_empty_negative_prompt_of_sd1_is_encoded(sd1: LatentDiffusion) -> None:
    negative = PromptConditioning(sd1).of_negatives([""])
    torch.testing.assert_close(negative, sd1.get_learned_conditioning([""]))


def test_maps_join_each_sample(sd1: LatentDiffusion) -> None:
    maps = [torch.ones(1, 1, 8, 8), torch.full((1, 4, 8, 8), 2.0)]
    conditioning = PromptConditioning(sd1, maps=maps)
    cond, negative = conditioning.of(PROMPTS), conditioning.of_negatives(["", ""])
    for found in (cond, negative):
        assert [tuple(part.shape) for part in found["c_concat"]] == [(2, 1, 8, 8), (2, 4, 8, 8)]
        assert (found["c_concat"][1] == 2).all()
    dropped = PromptConditioning(sd1, maps=maps, drops_image=True)
    assert not any(part.any() for part in dropped.of_negatives([""])["c_concat"])
    assert dropped.of([""])["c_concat"][0].all()
