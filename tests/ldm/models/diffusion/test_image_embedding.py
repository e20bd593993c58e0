"""The model of image variations, Stable unCLIP: its vector is the embedding of an image, with noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import ImageEmbeddingConditionedLatentDiffusion
from ldm.shards.sample import STREAM
from ldm.util import UserError
from tests.golden_data import case, seeded_tensor
from tests.ldm.models.diffusion.golden_v2 import build_v2

NOISE = {
    "target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation",
    "params": {"timestep_dim": 6, "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}},
}


class MeanColour(torch.nn.Module):
    """Image tower (B, 3, H, W) → (B, 3)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def build(**changes: Any) -> ImageEmbeddingConditionedLatentDiffusion:
    unet = {**case("zero_snr")["unet"], "num_classes": "sequential", "adm_in_channels": 9}
    params = {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "conditioning_key": "crossattn-adm", "first_stage_key": "jpg",
        "embedder_config": {"target": "torch.nn.Identity"}, "noise_aug_config": NOISE, **changes,
    }  # fmt: skip
    model = build_v2("zero_snr", "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion", **params)
    model.embedder = MeanColour()
    return model


def batch() -> dict[str, torch.Tensor]:
    return {"jpg": torch.rand(8, 64, 64, 3) * 2 - 1, "t5": seeded_tensor("latent/t5", (8, 7, 64))}


@pytest.mark.slow
def test_image_variations_train_and_sample() -> None:
    model = build(embedding_dropout=0.5)
    assert not model.noise_augmentor.training and "noise_augmentor.betas" in model.state_dict()
    images = batch()
    loss, _ = model.shared_step(images)
    loss.backward()
    assert loss.isfinite() and model.model.diffusion_model.label_emb[0][0].weight.grad.abs().sum() > 0
    logged = model.eval().log_images(images, N=2, ddim_steps=2, unconditional_guidance_scale=1.0)
    assert logged["samples"].shape == (2, 3, 64, 64) and logged["samples"].isfinite().all()


def test_image_vector_drops_the_share_of_training_alone() -> None:
    model, images = build(embedding_dropout=1.0), batch()
    assert model.image_vector(images).abs().sum() == 0
    cond = model.eval().encode_conditioning(images)
    assert cond["c_adm"].shape == (8, 9) and cond["c_crossattn"][0].shape == (8, 7, 64)
    assert (cond["c_adm"].abs().sum(dim=1) > 0).all()
    named = {**images, STREAM: [f"row {row}" for row in range(8)]}
    assert torch.equal(model.image_vector(named), model.image_vector(named))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dropout": 1.5}, "embedding_dropout 1.5: give a number from 0 to 1"),
        ({"freeze_embedder": False}, "freeze_embedder false: "),
        ({"conditioning_key": "crossattn"}, "conditioning_key 'crossattn': must be 'crossattn-adm'"),
    ],
)
def test_bad_settings_of_image_variations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_pre_encoded_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"embedding_key 'jpg': .* needs images"):
        build().encode_conditioning({**batch(), "jpg": torch.zeros(8, 4, 8, 8)})
