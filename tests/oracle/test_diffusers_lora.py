"""diffusers converts an extracted LoRA by its own names, and its UNet with it predicts what ours does.

Its loader needs peft, which is not installed. Here, its converted factors are added to its layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.checkpoint.keys import UNET
from ldm.release.families import FAMILIES
from ldm.release.layer_names import layers_of
from ldm.release.load import load_release
from ldm.release.lora_extraction import Target, extract_files
from ldm.release.lora_merging import Lora
from ldm.release.recognition import shapes_of
from tests.golden_data import relative_error, seeded_tensor
from tests.narrow_models import CONTEXT, OPEN_CLIP
from tests.tiny_families import write_tiny

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
TINY = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {**TINY, "attention_head_dim": 8, "cross_attention_dim": CONTEXT[768]},
    "sd2_base": {
        **TINY,
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": CONTEXT[1024],
        "use_linear_projection": True,
    },
    "sdxl": {
        **TINY,
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": CONTEXT[2048],
        "use_linear_projection": True,
        "transformer_layers_per_block": 1,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": OPEN_CLIP["embed_dim"] + 48,
    },
}
PIPELINES = {"sdxl": diffusers.StableDiffusionXLPipeline}


def tuned(path: Path) -> Path:
    """Write the release at `path` with other weights in all layers of its UNet, and return its path."""
    plain = load_state_dict(path)
    moved = {}
    for layer in layers_of(shapes_of(plain)):
        if layer.key.startswith(UNET) and not layer.is_outside:
            value = plain[layer.key]
            moved[layer.key] = value + 0.5 * value.std() * seeded_tensor(f"to {layer.key}", tuple(value.shape))
    save_state_dict({**plain, **moved}, path.with_name("tuned.safetensors"))
    return path.with_name("tuned.safetensors")


def add_to(unet: torch.nn.Module, lora: Path, family: str) -> int:
    """Add the file to diffusers' `unet`, by the names that diffusers gives its layers; return their number."""
    pipeline = PIPELINES.get(family, diffusers.StableDiffusionPipeline)
    state, alphas = pipeline.lora_state_dict(str(lora), unet_config=unet.config)
    own = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    assert len(own) == len(state)
    factors: dict[str, Tensor] = convert_unet_state_dict_to_peft(own)
    names = {key.rpartition(".lora_A.weight")[0] for key in factors if ".lora_A." in key}
    assert set(alphas.values()) <= {float(len(factors[f"{name}.lora_A.weight"])) for name in names}
    for name in names:
        down, up = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
        weight = unet.get_submodule(name).weight
        weight.data += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return len(names)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_extracted_lora_in_diffusers(family: str, tmp_path: Path) -> None:
    release, config = write_tiny(family, tmp_path)
    lora = tmp_path / "lora.safetensors"
    found = extract_files(release, tuned(release), lora, Target(rank=8))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(CONFIGS[family]))
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(release), config=str(tmp_path / "unet"), local_files_only=True
    ).eval()
    ours = load_release(release, config, loras=[Lora(lora)])
    plain = load_release(release, config)
    x, t = seeded_tensor("oracle/x", (2, 4, 16, 16)), torch.tensor([3, 731])
    context = seeded_tensor("oracle/context", (2, 77, CONFIGS[family]["cross_attention_dim"]))
    cond, added = {"c_crossattn": [context]}, None
    if FAMILIES[family].has_vector:
        pooled, numbers = seeded_tensor("oracle/pooled", (2, OPEN_CLIP["embed_dim"])), torch.arange(12.0).reshape(2, 6)
        embed = ours.cond_stage_model.embedders[2]
        cond["c_adm"] = torch.cat([pooled, *(embed(pair) for pair in numbers.split(2, dim=1))], dim=1)
        added = {"text_embeds": pooled, "time_ids": numbers}

    def reference() -> Tensor:
        return theirs(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample

    assert relative_error(plain.apply_model(x, t, cond), reference()) < 1e-5
    before = ours.apply_model(x, t, cond)
    assert relative_error(before, reference()) > 1e-2
    assert add_to(theirs, lora, family) == len(found.layers)
    assert relative_error(before, reference()) < 1e-4
