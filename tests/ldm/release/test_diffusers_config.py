"""Tests of the configs of diffusers' folders at full size. tests/oracle/test_diffusers_folders.py builds from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm.config.load import load_config
from ldm.release.configs import release_config, training_config
from ldm.release.diffusers_config import check_settings, folder_configs
from ldm.release.diffusers_writing import shapes_by_part
from ldm.release.families import FAMILIES
from ldm.release.opening import open_release
from tests.conftest import ROOT
from tests.golden_data import RELEASED
from tests.sparse_files import write_sparse


def write_sparse_folder(key: str, folder: Path) -> Path:
    """Write a folder of full size that takes no room on the disk."""
    keys = json.loads((ROOT / f"tests/golden/{RELEASED[key]}_keys.json").read_text())["keys"]
    shapes = shapes_by_part({name: torch.empty(shape, device="meta") for name, (shape, _) in keys.items()})
    family = FAMILIES[key]
    configs = folder_configs(load_config([family.config]), shapes, family.parameterization, family.zero_snr)
    for name, content in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for part, found in shapes.items():
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        write_sparse(folder / part / f"{stem}.fp16.safetensors", found)
    return folder


@pytest.mark.parametrize("key", RELEASED)
def test_a_folder_of_every_family_is_recognised(key: str, tmp_path: Path) -> None:
    folder, family = write_sparse_folder(key, tmp_path), FAMILIES[key]
    name, config = release_config(folder)
    assert name == family.config
    assert config.model.params.get("parameterization", "eps") == family.parameterization
    assert training_config(folder).names == [family.finetune_config]
    check_settings(open_release(folder).folder, config)
    pipelines = {"sd1_inpainting": "StableDiffusionInpaint", "instruct_pix2pix": "StableDiffusionInstructPix2Pix"}
    name = pipelines.get(key, "StableDiffusionXL" if key == "sdxl" else "StableDiffusion")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == f"{name}Pipeline"


def test_folder_configs_are_those_that_people_know() -> None:
    def configs(key: str) -> dict:
        keys = json.loads((ROOT / f"tests/golden/{RELEASED[key]}_keys.json").read_text())["keys"]
        shapes = shapes_by_part({name: torch.empty(shape, device="meta") for name, (shape, _) in keys.items()})
        return folder_configs(load_config([FAMILIES[key].config]), shapes, "v", True)

    unet = configs("sdxl")["unet/config.json"]
    assert unet["attention_head_dim"] == [5, 10, 20] and unet["transformer_layers_per_block"] == [1, 2, 10]
    assert unet["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet["up_block_types"] == ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    assert (unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]) == (256, 2816)
    assert (unet["cross_attention_dim"], unet["sample_size"]) == (2048, 128)
    sd2 = configs("sd2_768_v")
    assert sd2["text_encoder/config.json"]["num_hidden_layers"] == 23
    assert sd2["text_encoder/config.json"]["hidden_act"] == "gelu"
    assert sd2["scheduler/scheduler_config.json"]["prediction_type"] == "v_prediction"
    assert sd2["scheduler/scheduler_config.json"]["rescale_betas_zero_snr"] is True
    assert sd2["unet/config.json"]["attention_head_dim"] == [5, 10, 20, 20]
    assert configs("sd1")["unet/config.json"]["attention_head_dim"] == [8, 8, 8, 8]
    assert configs("sd1")["vae/config.json"]["scaling_factor"] == 0.18215
