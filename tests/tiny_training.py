"""A tiny model of each family, made of its release config: random weights, the same keys, small widths."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_state_dict
from ldm.config.load import build_model, load_config
from ldm.release.families import FAMILIES

# Families whose samples pre-encoding makes.
ENCODED = tuple(key for key in FAMILIES if key != "sd2_depth")
PIXELS = 64  # of an image that fits a tiny model
_ENCODERS = "ldm.modules.encoders.modules"
_UNET = {
    "model_channels": 32,
    "attention_resolutions": [2, 1],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "transformer_depth": 1,
}
_CLIP = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_OPEN_CLIP = {"width": 16, "heads": 2, "layers": 2, "embed_dim": 12}
_SIZES = ("original_size", "crop_top_left", "target_size")
_OUTDIM = 4


def release_config(key: str) -> dict[str, Any]:
    """The release config of the family `key`, of a tiny model."""
    config = OmegaConf.to_container(load_config([FAMILIES[key].config]))
    params = config["model"]["params"]
    unet, stage = params["unet_config"]["params"], params["cond_stage_config"]
    unet |= _UNET
    params |= {"timesteps": 50, "image_size": PIXELS // 8}
    for name, value in (("num_heads", 2), ("num_head_channels", 16)):
        unet |= {name: value} if name in unet else {}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1] * 4, "num_res_blocks": 1}
    embedders = stage["params"]["emb_models"] if "emb_models" in stage.get("params", {}) else [stage]
    for embedder in embedders:
        name, options = embedder["target"].rpartition(".")[2], embedder.setdefault("params", {})
        if name == "FrozenCLIPEmbedder":
            options |= {"text_config": _CLIP, **({"layer_idx": 1} if "layer_idx" in options else {})}
        elif name == "ConcatTimestepEmbedderND":
            options["outdim"] = _OUTDIM
        else:
            options["text_config"] = _OPEN_CLIP
    unet["context_dim"] = {"sd1": 8, "sd2": 16}.get(key[:3], 8 if key == "instruct_pix2pix" else 24)
    if "adm_in_channels" in unet:
        unet["adm_in_channels"] = _OPEN_CLIP["embed_dim"] + 2 * len(_SIZES) * _OUTDIM
    return config


def finetune_config(key: str, release: Path, shards: Path | str) -> dict[str, Any]:
    """A config that trains a tiny model of the family `key` from `release` on pre-encoded `shards`."""
    config = deepcopy(release_config(key))
    params = config["model"]["params"]
    config["model"]["base_learning_rate"] = 1e-3
    params |= {"first_stage_key": "f8", "cond_stage_key": "t5", "ckpt_path": str(release), "use_ema": True}
    params["monitor"] = "val/loss_simple_ema"
    params["cond_stage_config"] = _stored_conditioning(FAMILIES[key].has_vector)
    dropping = {} if key == "instruct_pix2pix" else {"null_cond_dropout": 0.3}
    data = {"batch_size": 2, "num_workers": 0, "training_urls": str(shards), **dropping}
    return {
        **config,
        "data": {"target": "main.WebDataNpyModuleFromConfig", "params": data},
        "lightning": {
            "callbacks": {"image_logger": {"params": {"disabled": True}}},
            "trainer": {"log_every_n_steps": 1, "enable_model_summary": False},
        },
    }


def _stored_conditioning(has_vector: bool) -> dict[str, Any]:
    if not has_vector:
        return {"target": f"{_ENCODERS}.DummyEncoder", "params": {"key": "t5"}}
    stored = [{"target": f"{_ENCODERS}.IdentityEncoder", "input_key": name} for name in ("t5", "pooled")]
    sizes = [
        {"target": f"{_ENCODERS}.ConcatTimestepEmbedderND", "params": {"outdim": _OUTDIM}, "input_key": name}
        for name in _SIZES
    ]
    return {"target": f"{_ENCODERS}.GeneralConditioner", "params": {"emb_models": [*stored, *sizes]}}


def write_release(key: str, folder: Path) -> tuple[Path, Path]:
    """A release of a tiny model of the family `key`, and its config, in `folder`."""
    config = release_config(key)
    model, generator = build_model(OmegaConf.create(config)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # those that begin at 0 too
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    save_state_dict(model.state_dict(), folder / f"{key}.safetensors")
    return folder / f"{key}.safetensors", write_config(config, folder / f"{key}_release.yaml")


def write_config(config: Mapping[str, Any], path: Path) -> Path:
    OmegaConf.save(OmegaConf.create(config), path)
    return path
