"""Releases of the families at small width and depth, with seeded weights, for tests of command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.checkpoint import save_state_dict
from ldm.release.families import FAMILIES
from tests.narrow_models import OPEN_CLIP, TOWERS, narrow, seeded_weights

SIDE = 64  # pixels of the images that a tiny model makes by default
_OUTDIM = 8  # features of a number of SDXL's sizes
_LAYERS = {"FrozenCLIPEmbedder": "num_hidden_layers", "FrozenOpenCLIPEmbedder": "layers"}
_LAYERS["FrozenOpenCLIPEmbedder2"] = "layers"
# Estimates depth as a weighted sum of the colours.
_DEPTH_STAGE = {
    "target": "torch.nn.Conv2d",
    "params": {"in_channels": 3, "out_channels": 1, "kernel_size": 1, "bias": False},
}


def tiny_config(key: str) -> dict[str, Any]:
    """Return the release config of the family `key`, with small networks."""
    config = narrow(FAMILIES[key].config)
    params = config["model"]["params"]
    params["image_size"] = SIDE // 8
    unet = params["unet_config"]["params"]
    unet |= {"num_res_blocks": 1, "transformer_depth": 1}
    unet |= {"channel_mult": unet["channel_mult"][:3], "attention_resolutions": [4, 2]}
    if "num_head_channels" in unet:
        unet["num_head_channels"] = 16
    if "adm_in_channels" in unet:
        unet["adm_in_channels"] = OPEN_CLIP["embed_dim"] + 6 * _OUTDIM
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    if "depth_stage_config" in params:
        params["depth_stage_config"] = _DEPTH_STAGE
    shrink(params["cond_stage_config"])
    return config


def shrink(described: dict[str, Any]) -> None:
    kind = described["target"].rpartition(".")[2]
    params = described["params"] = dict(described.get("params") or {})
    if kind in _LAYERS:
        params["text_config"] = {**TOWERS[kind], _LAYERS[kind]: 2}
    if "layer_idx" in params:
        params["layer_idx"] = 1
    if "outdim" in params:
        params["outdim"] = _OUTDIM
    for embedder in params.get("emb_models", ()):
        shrink(embedder)


def write_tiny(key: str, folder: Path, **params: Any) -> tuple[Path, Path]:
    """Write a release of the family `key` and its config to `folder`; `params` are changes of the model's params."""
    config = tiny_config(key)
    config["model"]["params"] |= params
    config_path, release = folder / f"{key}.yaml", folder / f"{key}.safetensors"
    OmegaConf.save(OmegaConf.create(config), config_path)
    save_state_dict(seeded_weights(config_path), release)
    return release, config_path
