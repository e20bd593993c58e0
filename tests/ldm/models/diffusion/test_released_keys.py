"""Models of the released configs, built whole on the meta device: their keys and shapes are the released ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config
from tests.golden_data import released_keys

MODULES = "ldm.modules.encoders.modules"
UNET = {
    "use_checkpoint": True,
    "image_size": 32,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "legacy": False,
}
V1 = {"num_heads": 8, "context_dim": 768}
V2 = {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}
CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
OPEN_CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"freeze": True, "layer": "penultimate"},
}
LOW_SCALE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_start": 0.0001, "linear_end": 0.02}, "max_noise_level": 350},
}


def first_stage(ch_mult: list[int]) -> dict[str, Any]:
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": ch_mult, "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    params = {"embed_dim": 4, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def build(target: str, unet: dict[str, Any], cond_stage: dict[str, Any], **params: Any) -> LatentDiffusion:
    """Return the model of a released config, as it stands there, without memory for its weights."""
    released = {
        "linear_start": 0.00085, "linear_end": 0.012, "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000,
        "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 64, "channels": 4,
        "cond_stage_trainable": False, "conditioning_key": "hybrid", "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215, "use_ema": False, "cond_stage_config": cond_stage,
        "first_stage_config": first_stage([1, 2, 4, 4]),
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**UNET, **unet}},
    }  # fmt: skip
    with torch.device("meta"):
        return instantiate_from_config({"target": f"ldm.models.diffusion.{target}", "params": {**released, **params}})


def check_keys(model: LatentDiffusion, file: str) -> None:
    expected = {key: shape for key, shape in released_keys(file=file).items() if not key.endswith("position_ids")}
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == expected


def test_keys_of_v1_inpainting() -> None:
    model = build("ddpm.LatentInpaintDiffusion", {**V1, "in_channels": 9}, CLIP, finetune_keys=None)
    check_keys(model, "sd_v1_inpainting_keys")


def test_keys_of_instruct_pix2pix() -> None:
    keys = {"first_stage_key": "edited", "cond_stage_key": "edit", "image_size": 32, "load_ema": False}
    check_keys(build("ddpm_edit.LatentDiffusion", {**V1, "in_channels": 8}, CLIP, **keys), "instruct_pix2pix_keys")


def test_keys_of_v2() -> None:
    model = build(
        "ddpm.LatentDiffusion", {**V2, "in_channels": 4}, OPEN_CLIP, conditioning_key="crossattn", parameterization="v"
    )
    check_keys(model, "sd_v2_keys")


# Class, and changes to the UNet and to the model, of each released config of SD 2; the texts are Stability-AI's.
PLAIN = {"conditioning_key": "crossattn"}
ON_A_CPU = {"use_checkpoint": False, "use_fp16": False}
UPSCALER = {
    "in_channels": 7, "num_classes": 1000, "model_channels": 256, "attention_resolutions": [2, 4, 8],
    "channel_mult": [1, 2, 2, 4], "disable_self_attentions": [True, True, True, False],
    "disable_middle_self_attn": False, "num_heads": 8, "num_head_channels": -1, "image_size": 128,
}  # fmt: skip
UPSCALING = {
    "parameterization": "v", "low_scale_key": "lr", "conditioning_key": "hybrid-adm", "image_size": 128,
    "linear_start": 0.0001, "linear_end": 0.02, "scale_factor": 0.08333, "low_scale_config": LOW_SCALE,
    "first_stage_config": first_stage([1, 2, 4]),
}  # fmt: skip
DEPTH = {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": "dpt_hybrid"}}
RELEASED_V2 = {
    "base": ("LatentDiffusion", {"use_fp16": True}, PLAIN),
    "v": ("LatentDiffusion", {"use_fp16": True}, {**PLAIN, "parameterization": "v"}),
    "base, float32": ("LatentDiffusion", ON_A_CPU, PLAIN),
    "base, bfloat16": ("LatentDiffusion", {**ON_A_CPU, "use_bf16": True}, PLAIN),
    "v, float32": ("LatentDiffusion", ON_A_CPU, {**PLAIN, "parameterization": "v"}),
    "v, bfloat16": ("LatentDiffusion", {**ON_A_CPU, "use_bf16": True}, {**PLAIN, "parameterization": "v"}),
    "inpainting": ("LatentInpaintDiffusion", {"in_channels": 9}, {}),
    "depth": ("LatentDepth2ImageDiffusion", {"in_channels": 5}, {"finetune_keys": None, "depth_stage_config": DEPTH}),
    "upscaler": ("LatentUpscaleDiffusion", UPSCALER, UPSCALING),
}


@pytest.mark.parametrize("name", RELEASED_V2)
def test_families_of_v2_build_from_their_released_params(name: str) -> None:
    target, unet, params = RELEASED_V2[name]
    unet = {**V2, "in_channels": 4, **unet}
    model = build(f"ddpm.{target}", unet, OPEN_CLIP, **params)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["model.diffusion_model.input_blocks.0.0.weight"][1] == unet["in_channels"]
    assert model.parameterization == params.get("parameterization", "eps")
    if name == "upscaler":
        assert shapes["model.diffusion_model.label_emb.weight"] == (1000, 1024)
        return
    own = {key: shape for key, shape in shapes.items() if not key.startswith("depth_model.")}
    expected = released_keys(file="sd_v2_keys")
    changed = {key for key in expected.keys() | own.keys() if own.get(key) != expected.get(key)}
    assert changed == ({"model.diffusion_model.input_blocks.0.0.weight"} if unet["in_channels"] > 4 else set())


# Image tower, features of the embedding, and of the whole vector, of the two released models of image variations.
UNCLIP = {
    "l": ({"target": f"{MODULES}.ClipImageEmbedder", "params": {"model": "ViT-L/14"}}, 768, 1536),
    "h": ({"target": f"{MODULES}.FrozenOpenCLIPImageEmbedder"}, 1024, 2048),
}


@pytest.mark.parametrize("name", UNCLIP)
def test_unclip_builds_from_its_released_params(name: str) -> None:
    tower, features, vector = UNCLIP[name]
    noise = {"timestep_dim": features, "noise_schedule_config": {"beta_schedule": "squaredcos_cap_v2"}}
    if name == "l":
        noise["clip_stats_path"] = "checkpoints/karlo_models/ViT-L-14_stats.th"
    unet = {"in_channels": 4, "num_classes": "sequential", "adm_in_channels": vector}
    model = build(
        "ddpm.ImageEmbeddingConditionedLatentDiffusion", {**V2, **unet}, OPEN_CLIP, embedder_config=tower,
        noise_aug_config={"target": f"{MODULES}.CLIPEmbeddingNoiseAugmentation", "params": noise},
        conditioning_key="crossattn-adm", embedding_dropout=0.25, parameterization="v",
    )  # fmt: skip
    state = model.state_dict()
    assert state["model.diffusion_model.label_emb.0.0.weight"].shape == (1280, vector)
    assert state["embedder.model.visual.proj"].shape[1] == features
