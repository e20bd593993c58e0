"""Models of the families with all of the released keys and a small width, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.checkpoint.keys import CONDITIONER, SCHEDULE_KEYS, has_part
from ldm.config.load import build_model, load_config, plain
from ldm.release.families import Family
from tests.golden_data import seeded_weight

# Widths of the text towers. The two of SDXL differ, since diffusers tells them apart by it.
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16}
OPEN_CLIP = {"width": 24, "heads": 2, "embed_dim": 24}
# Features of the context, by those of the release: SD 1, SD 2, SDXL.
CONTEXT = {768: CLIP["hidden_size"], 1024: OPEN_CLIP["width"], 2048: CLIP["hidden_size"] + OPEN_CLIP["width"]}
VECTOR = OPEN_CLIP["embed_dim"] + 6 * 256  # features of the vector: of the caption, and of six numbers
TOWERS = {"FrozenCLIPEmbedder": CLIP, "FrozenOpenCLIPEmbedder": OPEN_CLIP, "FrozenOpenCLIPEmbedder2": OPEN_CLIP}


def narrow(name: str) -> dict[str, Any]:
    """Return the content of the config `name`, with networks of all of its layers and a small width."""
    config = plain(load_config([name]))
    params = config["model"]["params"]
    unet = params["unet_config"]["params"]
    unet |= {"model_channels": 32, "context_dim": CONTEXT[unet["context_dim"]]}
    if "num_head_channels" in unet:
        unet["num_head_channels"] = 32
    if "adm_in_channels" in unet:
        unet["adm_in_channels"] = VECTOR
    params["first_stage_config"]["params"]["ddconfig"]["ch"] = 32
    _narrow_towers(params["cond_stage_config"])
    return config


def _narrow_towers(described: dict[str, Any]) -> None:
    kind = described["target"].rpartition(".")[2]
    if kind in TOWERS:
        described["params"] = {**(described.get("params") or {}), "text_config": TOWERS[kind]}
    for embedder in (described.get("params") or {}).get("emb_models", ()):
        _narrow_towers(embedder)


def write_configs(family: Family, folder: Path) -> tuple[Path, Path]:
    """Write the narrow release config and finetune config of `family` to `folder`."""
    paths = folder / f"{family.key}.yaml", folder / f"finetune_{family.key}.yaml"
    for path, name in zip(paths, (family.config, family.finetune_config), strict=True):
        OmegaConf.save(OmegaConf.create(narrow(name)), path)
    return paths


def seeded_weights(config: Path) -> dict[str, Tensor]:
    """Return the state dict of the model of `config`, with seeded weights."""
    model = build_model(load_config([config]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim:
                parameter.copy_(seeded_weight(key, tuple(parameter.shape)))
    return model.state_dict()


def write_release(config: Path, path: Path) -> dict[str, Tensor]:
    """Write a release of `config` to `path`, and return its weights. As in SDXL's files, those have no schedule."""
    weights = seeded_weights(config)
    if has_part(weights, CONDITIONER):
        weights = {key: value for key, value in weights.items() if key not in SCHEDULE_KEYS}
    save_state_dict(weights, path)
    return weights
