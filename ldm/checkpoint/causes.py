"""Likely causes of a mismatch of weights and model, for the end of messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch

from ldm.checkpoint.keys import (
    COND_STAGE,
    CONDITIONER,
    DOWN,
    EMA,
    FIRST_STAGE,
    MODEL,
    TEXT_ENCODERS,
    UNET,
    has_part,
    is_factor,
)
from ldm.checkpoint.other_models import other_architecture, other_model

_CONV_IN = f"{UNET}input_blocks.0.0.weight"
_LABELS = f"{UNET}label_emb."
_CONTEXT = re.compile(rf"^{re.escape(UNET)}.*\.attn2\.to_k\.weight$")
_CHANNELS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth model", 7: "an upscaler"}
# Names that stand beside, or end the name of, a quantised weight: its scale and the like. EMA names have no dots, so
# that the EMA of `to_q.weight` would match.
_SCALES = re.compile(
    rf"^(?!{re.escape(EMA)})(?:.*[._])?"
    r"(?:scale_weight|weight_scale|scale_input|scaled_fp8|absmax|quant_map|qweight|qzeros|scales|SCB)$"
)
_LORA = re.compile(
    r"lora_|^lycoris_|[._]lora\.(?:down|up)\.|\.(?:hada|lokr)_[wt]\d|\.(?:b?oft|ia3|vera|glora)_|\.(?:dora_scale|diff|diff_b)$"
)
_FIRST = ("input_blocks.0.0.weight", "input_blocks00weight")  # ends of the UNet's first weight, and of its EMA's
_WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}
NO_UNET = "the file holds no UNet; name a whole release"
_DIFFUSERS = (
    "the file has the layout of diffusers; name the folder of the whole model, which has model_index.json, and put a "
    "UNet alone into its unet/"
)
_NO_VAE = "the file holds no autoencoder: --vae FILE takes one from another file"
_QUANTISED = "its weights are quantised; save them as floating-point numbers"
_NO_TEXT = "the file holds no text encoder: give a whole release, or a config whose cond stage needs none"


def likely_cause(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], default: str) -> str:
    """Return the likely cause for a mismatch of `weights` with the model of state dict `own`, or `default`."""
    for found in (
        _QUANTISED if any(map(is_scale, weights)) else None,
        None if other_architecture(own) else other_architecture(weights),
        _file_kind(weights, own),
        _other_family(weights, own),
        _other_unet(weights, own),
        _other_lora(weights, own),
    ):
        if found:
            return found
    if has_part(own, MODEL) and not has_part(weights, MODEL) and not has_part(weights, EMA):
        return NO_UNET
    lacks = [part for part in (FIRST_STAGE, *TEXT_ENCODERS) if has_part(own, part) and not has_part(weights, part)]
    if len(lacks) == 2:
        return (
            f"the file holds a UNet alone; {_NO_VAE}, but no option gives a text encoder: name a whole release, or put "
            "the unet/ of a training of diffusers into a copy of the base's folder"
        )
    if not lacks:
        return default
    return _NO_VAE if lacks == [FIRST_STAGE] else _NO_TEXT


def is_scale(key: str) -> bool:
    """Return True for the name of a scale of a quantised weight and the like."""
    return _SCALES.search(key) is not None


def diffusers_layout(keys: Iterable[str]) -> bool:
    """Return True if `keys` have block names of diffusers."""
    return any(re.search(r"(?:^|\.)(?:down|up)_blocks\.\d|(?:^|\.)mid_block\.", key) for key in keys)


def _file_kind(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str | None:
    if has_part(own, MODEL):
        return other_kind(weights)
    return _DIFFUSERS if diffusers_layout(weights) and not diffusers_layout(own) else None


def other_kind(weights: Collection[str]) -> str | None:
    """Return the kind of a file without a UNet, by its keys, or None if unknown."""
    if is_lora(weights):
        return "the file is a LoRA: give it by --lora FILE, and a release beside it"
    if has_part(weights, MODEL) or has_part(weights, EMA):
        return None
    if found := other_model(weights):
        return found
    if diffusers_layout(weights):
        return _DIFFUSERS
    if has_part(weights, "encoder.") and has_part(weights, "decoder."):
        return "the file is an autoencoder alone: give it by --vae FILE, and a release beside it"
    if has_part(weights, "text_model."):
        return "the file is a text encoder alone; name a whole release"
    return None


def is_lora(keys: Collection[str]) -> bool:
    """Return True if `keys` are those of a LoRA, which may begin as those of a UNet do. A release may carry a LoRA."""
    return any(_LORA.search(key) for key in keys) and not any(key.endswith(_FIRST) for key in keys)


def _other_family(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str | None:
    has_no_text = not any(has_part(own, part) for part in TEXT_ENCODERS)
    may_be_sdxl = has_part(own, CONDITIONER) or (has_no_text and has_part(own, _LABELS))
    if has_part(weights, CONDITIONER) and not may_be_sdxl:
        return "the file has the layout of SDXL, and the config describes another family; name its own config"
    openclip = f"{COND_STAGE}model."
    if has_part(weights, openclip) and has_part(own, COND_STAGE) and not has_part(own, openclip):
        return (
            "the file has the layout of SD 2 (an OpenCLIP text encoder), and the config describes another family; "
            "name its own config"
        )
    return None


def _other_unet(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str | None:
    theirs, ours = weights.get(_CONV_IN), own.get(_CONV_IN)
    if theirs is not None and ours is not None and theirs.ndim == ours.ndim == 4 and theirs.shape[1] != ours.shape[1]:
        count = theirs.shape[1]
        if count in _CHANNELS:
            return (
                f"its UNet takes {count} channels, as {_CHANNELS[count]} does, and the config's {ours.shape[1]}; "
                "name the config of that model"
            )
    key = next((key for key in weights if _CONTEXT.match(key) and key in own), None)
    if key and weights[key].ndim == own[key].ndim == 2 and weights[key].shape[1] != own[key].shape[1]:
        width = weights[key].shape[1]
        if width in _WIDTHS:
            return (
                f"its UNet reads captions of width {width}, as {_WIDTHS[width]} does, and the config's of "
                f"{own[key].shape[1]}; name the config of that model"
            )
    return None


def _other_lora(weights: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str | None:
    theirs, ours = ({key: each[key] for key in each if is_factor(key)} for each in (weights, own))
    if not theirs:
        return None
    if not ours:
        return "the file is of a LoRA training: add lora.yaml to --base, with the settings of its run"
    if theirs.keys() != ours.keys():
        return "its LoRA has other targets; give those of its run as model.params.lora.targets"
    ranks = {len(value) for key, value in theirs.items() if key.endswith(DOWN) and value.ndim}
    return f"its LoRA has the rank {ranks.pop()}; set model.params.lora.rank to it" if len(ranks) == 1 else None
