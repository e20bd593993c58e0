"""State-dict keys of MiDaS' depth network in releases, and of the same network in transformers."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# Name in transformers → released name, tried in this order. Released names count stages from 1.
_RULES: tuple[tuple[str, str], ...] = (
    (r"dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
    (r"dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
    (r"dpt\.embeddings\.backbone\.bit\.embedder\.convolution\.", "pretrained.model.patch_embed.backbone.stem.conv."),
    (r"dpt\.embeddings\.backbone\.bit\.embedder\.norm\.", "pretrained.model.patch_embed.backbone.stem.norm."),
    (
        r"dpt\.embeddings\.backbone\.bit\.encoder\.stages\.(\d+)\.layers\.(\d+)\.",
        r"pretrained.model.patch_embed.backbone.stages.\1.blocks.\2.",
    ),
    (r"dpt\.embeddings\.projection\.", "pretrained.model.patch_embed.proj."),
    (r"dpt\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"pretrained.model.blocks.\1.attn.proj."),
    (r"dpt\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"pretrained.model.blocks.\1.mlp.fc1."),
    (r"dpt\.encoder\.layer\.(\d+)\.output\.dense\.", r"pretrained.model.blocks.\1.mlp.fc2."),
    (r"dpt\.encoder\.layer\.(\d+)\.layernorm_before\.", r"pretrained.model.blocks.\1.norm1."),
    (r"dpt\.encoder\.layer\.(\d+)\.layernorm_after\.", r"pretrained.model.blocks.\1.norm2."),
    (r"dpt\.layernorm\.", "pretrained.model.norm."),
    *(
        rule
        for i in range(4)
        for rule in (
            (rf"neck\.reassemble_stage\.readout_projects\.{i}\.0\.", f"pretrained.act_postprocess{i + 1}.0.project.0."),
            (rf"neck\.reassemble_stage\.layers\.{i}\.projection\.", f"pretrained.act_postprocess{i + 1}.3."),
            (rf"neck\.reassemble_stage\.layers\.{i}\.resize\.", f"pretrained.act_postprocess{i + 1}.4."),
            (rf"neck\.convs\.{i}\.", f"scratch.layer{i + 1}_rn."),
            (rf"neck\.fusion_stage\.layers\.{i}\.projection\.", f"scratch.refinenet{4 - i}.out_conv."),
            (
                rf"neck\.fusion_stage\.layers\.{i}\.residual_layer(\d)\.convolution(\d)\.",
                rf"scratch.refinenet{4 - i}.resConfUnit\1.conv\2.",
            ),
        )
    ),
    (r"head\.head\.", "scratch.output_conv."),
)
_QKV = re.compile(r"dpt\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
_FUSED = re.compile(r"pretrained\.model\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_PARTS = ("query", "key", "value")


def released_name(name: str) -> str:
    """Return the released key of transformers' key `name`. Query, key and value share one released key."""
    match = _QKV.fullmatch(name)
    if match:
        return f"pretrained.model.blocks.{match[1]}.attn.qkv.{match[3]}"
    for pattern, replacement in _RULES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    raise KeyError(name)


def to_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights `state` of transformers' network under the released keys."""
    released: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _QKV.fullmatch(name)
        if match is None:
            released[released_name(name)] = value
        elif match[2] == _PARTS[0]:
            parts = [state[name.replace(f".{_PARTS[0]}.", f".{part}.")] for part in _PARTS]
            released[released_name(name)] = torch.cat(parts)
    return released


def from_released(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return those of the released weights `state` that the network has, under transformers' keys.

    `names` maps each released key that is not fused to its key in transformers.
    """
    own: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _FUSED.fullmatch(key)
        if match:
            for part, piece in zip(_PARTS, value.chunk(3), strict=True):
                own[f"dpt.encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = piece
        elif key in names:
            own[names[key]] = value
    return own
