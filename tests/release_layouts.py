"""Release layouts of other programs, made from a plain release: equal weights, other names and extra values."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ldm.checkpoint import ema_key

Weights = dict[str, Tensor]

TOWER = "cond_stage_model.transformer."
ATTENTION = re.compile(r"(first_stage_model\.\w+\.mid\.attn_1)\.(q|k|v|proj_out|norm)\.(weight|bias)")


def without_text_model(plain: Weights) -> Weights:
    """Return the keys as the NovelAI family and transformers 5 write them."""
    return {key.replace("transformer.text_model.", "transformer."): value for key, value in plain.items()}


def whole_clip(plain: Weights) -> Weights:
    """Return a release that has a CLIP of two towers in place of its text tower."""
    extra = {
        **{f"{TOWER}vision_model.embeddings.class_embedding": torch.ones(4), f"{TOWER}logit_scale": torch.tensor(4.6)},
        **{f"{TOWER}text_projection.weight": torch.ones(4, 4), f"{TOWER}visual_projection.weight": torch.ones(4, 4)},
        f"{TOWER}text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    return {**plain, **extra}


def flat_clip(plain: Weights) -> Weights:
    """Apply `whole_clip` and `without_text_model`."""
    return without_text_model(whole_clip(plain))


def linear_attention(plain: Weights, names: str = "to_q to_k to_v to_out.0 group_norm") -> Weights:
    """Return a release whose autoencoder has attention in the names of diffusers, with linear layers."""
    theirs = dict(zip(("q", "k", "v", "proj_out", "norm"), names.split(), strict=True))

    def renamed(key: str, value: Tensor) -> tuple[str, Tensor]:
        match = ATTENTION.fullmatch(key)
        if not match:
            return key, value
        return f"{match[1]}.{theirs[match[2]]}.{match[3]}", value[:, :, 0, 0] if value.ndim == 4 else value

    return dict(renamed(*item) for item in plain.items())


def old_linear_attention(plain: Weights) -> Weights:
    return linear_attention(plain, "query key value proj_attn norm")


def linear_weights(plain: Weights) -> Weights:
    return linear_attention(plain, "q k v proj_out norm")


def extras(plain: Weights) -> Weights:
    """Add values of other programs, such as an average of the first stage and a ControlNet."""
    extra = {
        "first_stage_model.model_ema.decay": torch.tensor(0.99),
        "first_stage_model.model_ema.decoderconv_inbias": torch.ones(3),
        "embedding_manager.string_to_param_dict.*": torch.ones(1, 4),
        "lora_unet_mid_block.lora_up.weight": torch.ones(4, 1),
        "model.diffusion_model.out.2.lora_down.weight": torch.ones(1, 4),
        "control_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3),
        "denoiser.sigmas": torch.linspace(1, 2, 5),
        **{"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
        "safety_checker.concept_embeds": torch.ones(3, dtype=torch.bfloat16),
    }
    return {**extra, **plain}


def compiled(plain: Weights) -> Weights:
    return {key.replace("model.diffusion_model.", "model.diffusion_model._orig_mod."): v for key, v in plain.items()}


def wrapped(plain: Weights) -> Weights:
    return {f"module.{key}": value for key, value in plain.items()}


def bare_unet(plain: Weights) -> Weights:
    """Return a release whose UNet lacks the prefix."""
    return {key.removeprefix("model.diffusion_model."): value for key, value in plain.items()}


def averages_alone(plain: Weights) -> Weights:
    """Replace the UNet's weights by EMA weights."""
    named = {ema_key(key) if key.startswith("model.") else key: value for key, value in plain.items()}
    return {**named, "model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}


def bfloat16_schedule(plain: Weights) -> Weights:
    """Return a release whose schedule is bfloat16, as a program writes it that casts all tensors."""
    return {key: value.bfloat16() if "." not in key else value for key, value in plain.items()}


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        *(without_text_model, whole_clip, flat_clip, linear_attention, old_linear_attention, linear_weights),
        *(extras, compiled, wrapped, bare_unet, averages_alone, bfloat16_schedule),
    )
}
