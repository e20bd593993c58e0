"""Sizes of the networks in a diffusers folder, by the shapes of their weights, in the terms of its configs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoint.diffusers_keys import UNET_PART, VAE_PART
from ldm.util import UserError

Shapes = Mapping[str, Sequence[int]]

# Settings of networks that no weight tells. A network here has these values; a config may leave them out.
_UNET_CONSTANTS = {
    **{"act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "center_input_sample": False},
    **{"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "mid_block_scale_factor": 1},
    **{"resnet_time_scale_shift": "default", "only_cross_attention": False, "dual_cross_attention": False},
    **{"class_embed_type": None, "time_embedding_type": "positional", "encoder_hid_dim_type": None},
}
_VAE_CONSTANTS = {
    **{"act_fn": "silu", "norm_num_groups": 32, "shift_factor": None, "latents_mean": None, "latents_std": None},
}
_TEXT_CONSTANTS = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0}
CONSTANTS = {UNET_PART: _UNET_CONSTANTS, VAE_PART: _VAE_CONSTANTS}


def sizes_of(part: str, shapes: Shapes) -> dict[str, Any]:
    """Return the entries of a part's config that follow from the `shapes` of its weights by key.

    Entries that depend on a missing key are left out.
    """
    if part == UNET_PART:
        return _without_none(_unet_sizes(shapes))
    return _without_none(_vae_sizes(shapes) if part == VAE_PART else _text_sizes(shapes))


def check_sizes(part: str, config: Mapping[str, Any], shapes: Shapes, path: Path) -> None:
    """Raise `UserError` for an entry of `config`, read from `path`, that contradicts the weights or is not supported.

    Entries that the config lacks are not compared.
    """
    is_whole_clip = isinstance(config.get("text_config"), dict)
    config = config["text_config"] if is_whole_clip else config
    for key, value in CONSTANTS.get(part, _TEXT_CONSTANTS).items():
        if config.get(key, value) not in (value, None if value is False else value):
            raise UserError(f"{path}: {key} is {config[key]!r:.60}, and the networks here have {value!r}")
    for key, value in sizes_of(part, shapes).items():
        if is_whole_clip and key == "projection_dim":  # that of the tower is not used
            continue
        if key in config and not _same(key, config[key], value):
            raise UserError(f"{path}: {key} is {config[key]!r:.80}, but the weights have {value!r:.80}; one is damaged")


def _same(key: str, stated: Any, found: Any) -> bool:
    if key == "transformer_layers_per_block":  # levels without attention have any number
        stated = [stated] * len(found) if isinstance(stated, int) else stated
        return (
            isinstance(stated, list)
            and len(stated) == len(found)
            and all(two is None or one == two for one, two in zip(stated, found, strict=True))
        )
    if isinstance(found, int) and isinstance(stated, list):  # the same for all levels
        return all(each == found for each in stated)
    return stated == found


def _without_none(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def _side(shapes: Shapes, key: str, dimension: int) -> int | None:
    shape = shapes.get(key)
    return shape[dimension] if shape is not None and len(shape) > dimension else None


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    """Return the different numbers in the first group of `pattern`, sorted."""
    return sorted({int(match[1]) for key in shapes if (match := re.match(pattern, key))})


def _widths(shapes: Shapes, start: str) -> list[int] | None:
    levels = _numbers(shapes, rf"{re.escape(start)}\.(\d+)\.resnets\.0\.")
    widths = [_side(shapes, f"{start}.{level}.resnets.0.conv2.weight", 0) for level in levels]
    return widths if widths and None not in widths else None


def _depth(shapes: Shapes, start: str) -> int | None:
    return len(_numbers(shapes, rf"{re.escape(start)}\.transformer_blocks\.(\d+)\.")) or None


def _unet_sizes(shapes: Shapes) -> dict[str, Any]:
    widths = _widths(shapes, "down_blocks")
    levels = range(len(widths or ()))
    depths = [_depth(shapes, f"down_blocks.{level}.attentions.0") for level in levels]
    attends = [f"down_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in levels]
    rises = [f"up_blocks.{level}.attentions.0.proj_in.weight" in shapes for level in levels]
    contexts = [shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and len(shape) == 2]
    projections = [len(shape) for key, shape in shapes.items() if key.endswith(".proj_in.weight")]
    vector = _side(shapes, "add_embedding.linear_1.weight", 1)
    return {
        "in_channels": _side(shapes, "conv_in.weight", 1),
        "out_channels": _side(shapes, "conv_out.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(_numbers(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")) or None,
        "down_block_types": [f"{'CrossAttn' if yes else ''}DownBlock2D" for yes in attends] or None,
        "up_block_types": [f"{'CrossAttn' if yes else ''}UpBlock2D" for yes in rises] or None,
        "cross_attention_dim": contexts[0] if contexts else None,
        "transformer_layers_per_block": depths if any(depths) else None,
        "use_linear_projection": projections[0] == 2 if projections else None,
        "projection_class_embeddings_input_dim": vector,
    }


def _vae_sizes(shapes: Shapes) -> dict[str, Any]:
    widths = _widths(shapes, "encoder.down_blocks")
    levels = len(widths or ())
    return {
        "in_channels": _side(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _side(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _side(shapes, "decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels or None,
        "up_block_types": ["UpDecoderBlock2D"] * levels or None,
        "layers_per_block": len(_numbers(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")) or None,
    }


def _text_sizes(shapes: Shapes) -> dict[str, Any]:
    embeddings, first = "text_model.embeddings.", "text_model.encoder.layers.0.mlp.fc1.weight"
    return {
        "vocab_size": _side(shapes, f"{embeddings}token_embedding.weight", 0),
        "hidden_size": _side(shapes, f"{embeddings}token_embedding.weight", 1),
        "max_position_embeddings": _side(shapes, f"{embeddings}position_embedding.weight", 0),
        "intermediate_size": _side(shapes, first, 0),
        "num_hidden_layers": len(_numbers(shapes, r"text_model\.encoder\.layers\.(\d+)\.")) or None,
        "projection_dim": _side(shapes, "text_projection.weight", 0),
    }
