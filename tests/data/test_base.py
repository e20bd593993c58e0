"""Tests of the tiny base model: its size, samples of its captions, and its loss."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoint import load_state_dict
from ldm.data.datasets import ImageCaptionDataset
from ldm.evaluation.protocol import fixed_noise, midpoint_timesteps
from ldm.images.grid import image_distances
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.text_to_image import Request, latent_shape, text_to_image
from ldm.release.load import load_release
from tests.conftest import RELEASE_CONFIG, ROOT

BASE = ROOT / "data" / "base" / "emoji.safetensors"
PROMPTS = ["bear", "mouse face", "dog face", "tiger face", "fox", "red apple", "airplane", "penguin"]
LOSS = 0.06038


@pytest.fixture(scope="module")
def base() -> LatentDiffusion:
    return load_release(BASE, RELEASE_CONFIG)


@pytest.fixture(scope="module")
def known() -> dict[str, torch.Tensor]:
    """Return the training images (3, 64, 64) in [-1, 1], by caption."""
    dataset = ImageCaptionDataset(ROOT / "data" / "emoji", 64)
    return {item["caption"]: item["image"].permute(2, 0, 1) for item in dataset}


def test_the_release_is_small_float16_and_complete():
    assert BASE.stat().st_size <= 25_000_000
    weights = load_state_dict(BASE)
    assert {key.split(".")[0] for key in weights} >= {"model", "first_stage_model", "cond_stage_model"}
    assert not any(key.startswith("model_ema.") for key in weights)
    assert all(
        value.dtype == torch.float16 for key, value in weights.items() if "." in key and value.is_floating_point()
    )


def test_samples_match_their_captions(base, known):
    requests = [Request(prompt, 0) for prompt in PROMPTS]
    shape = latent_shape(base, None, None)
    drawn = text_to_image(base, requests, shape, sampler="dpm_solver", steps=15, scale=3, batch_size=8, verbose=False)
    distances = image_distances(torch.stack(list(drawn)), torch.stack(list(known.values())))
    captions = list(known)
    assert [captions[index] for index in distances.argmin(1)] == PROMPTS


def test_the_loss_on_fixed_noise_equals_the_recorded_one(base, known):
    chosen = list(known)[::60]
    latents = base.most_likely_latent(base.encode_first_stage(torch.stack([known[name] for name in chosen])))
    context = base.get_learned_conditioning(chosen)
    losses = []
    for t in midpoint_timesteps(base.num_timesteps, 8):
        noise = torch.stack([fixed_noise(name, t, latents.shape[1:]) for name in chosen])
        with torch.no_grad():
            losses.append(base.p_losses(latents, context, torch.full((len(chosen),), t), noise)[0])
    assert torch.stack(losses).mean().item() == pytest.approx(LOSS, rel=1e-3)
