"""Tests of the names of layers, against the released keys and the names that other programs give them."""

from __future__ import annotations

import json

import pytest

from ldm.release.layer_names import Layer, diffusers_paths, kohya_names, layers_of
from tests.conftest import ROOT

UNET = "model.diffusion_model."


def layers(name: str) -> dict[str, Layer]:
    """The layers of a released model, by their names in kohya's files."""
    keys = json.loads((ROOT / f"tests/golden/{name}_keys.json").read_text())["keys"]
    shapes = {key: tuple(shape) for key, (shape, _) in keys.items()}
    found = layers_of(shapes)
    names = kohya_names(found, shapes)
    assert len(set(names.values())) == len(found)
    return {names[layer]: layer for layer in found}


# Numbers of layers in kohya's files with convolutions: attentions 128, their projections 32, feed-forward layers 32,
# residual blocks 22 · 3 + 14 shortcuts, samplers 6; 12, 23 + 1 and 12 + 32 layers of six matrices in the text towers.
@pytest.mark.parametrize(("name", "unet", "text"), [("sd_v1", 278, 72), ("sd_v2", 278, 144), ("sdxl_base", 788, 264)])
def test_layers_of_count_what_kohyas_files_hold(name: str, unet: int, text: int) -> None:
    found = [layer for layer in layers(name).values() if not layer.is_outside]
    assert sum(layer.part == "unet" for layer in found) == unet
    assert sum(layer.part != "unet" for layer in found) == text


@pytest.mark.parametrize(
    ("name", "kohya", "key"),
    [
        ("sd_v1", "unet_down_blocks_0_attentions_0_proj_in", "input_blocks.1.1.proj_in"),
        ("sd_v1", "unet_down_blocks_0_resnets_1_time_emb_proj", "input_blocks.2.0.emb_layers.1"),
        ("sd_v1", "unet_down_blocks_2_downsamplers_0_conv", "input_blocks.9.0.op"),
        ("sd_v1", "unet_down_blocks_3_resnets_1_conv2", "input_blocks.11.0.out_layers.3"),
        ("sd_v1", "unet_mid_block_resnets_1_conv1", "middle_block.2.in_layers.2"),
        ("sd_v1", "unet_up_blocks_0_upsamplers_0_conv", "output_blocks.2.1.conv"),
        ("sd_v1", "unet_up_blocks_1_upsamplers_0_conv", "output_blocks.5.2.conv"),
        ("sd_v1", "unet_up_blocks_3_resnets_2_conv_shortcut", "output_blocks.11.0.skip_connection"),
        ("sd_v1", "unet_time_embedding_linear_2", "time_embed.2"),
        ("sd_v1", "unet_conv_out", "out.2"),
        (
            "sd_v2",
            "unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0",
        ),
        (
            "sdxl_base",
            "unet_input_blocks_4_1_transformer_blocks_1_ff_net_2",
            "input_blocks.4.1.transformer_blocks.1.ff.net.2",
        ),
        ("sdxl_base", "unet_output_blocks_2_2_conv", "output_blocks.2.2.conv"),
        ("sdxl_base", "unet_label_emb_0_0", "label_emb.0.0"),
    ],
)
def test_kohya_names_of_the_unet(name: str, kohya: str, key: str) -> None:
    assert layers(name)[f"lora_{kohya}"].key == f"{UNET}{key}.weight"


def test_layers_of_sdxl_have_the_names_of_diffusers_too() -> None:
    found = {layer.key.removeprefix(UNET): layer.paths[1] for layer in layers("sdxl_base").values()}
    assert found["input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight"] == (
        "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q"
    )
    assert found["output_blocks.5.2.conv.weight"] == "up_blocks.1.upsamplers.0.conv"
    assert found["output_blocks.8.0.skip_connection.weight"] == "up_blocks.2.resnets.2.conv_shortcut"


CLIP, OPEN_CLIP = "transformer.text_model.encoder.layers", "model.transformer.resblocks"


@pytest.mark.parametrize(
    ("name", "kohya", "key", "rows"),
    [
        ("sd_v1", "te:11_mlp_fc1", f"cond_stage_model.{CLIP}.11.mlp.fc1.weight", None),
        ("sd_v2", "te:3_self_attn_k_proj", f"cond_stage_model.{OPEN_CLIP}.3.attn.in_proj_weight", (1024, 2048)),
        ("sdxl_base", "te1:0_self_attn_out_proj", f"conditioner.embedders.0.{CLIP}.0.self_attn.out_proj.weight", None),
        (
            "sdxl_base",
            "te2:9_self_attn_v_proj",
            f"conditioner.embedders.1.{OPEN_CLIP}.9.attn.in_proj_weight",
            (2560, 3840),
        ),
        ("sdxl_base", "te2:0_mlp_fc2", f"conditioner.embedders.1.{OPEN_CLIP}.0.mlp.c_proj.weight", None),
    ],
)
def test_kohya_names_of_text_towers(name: str, kohya: str, key: str, rows: tuple[int, int] | None) -> None:
    layer = layers(name)[f"lora_{kohya.replace(':', '_text_model_encoder_layers_')}"]
    assert (layer.key, layer.rows) == (key, rows)
    assert rows is None or layer.shape[0] == rows[1] - rows[0]


def test_diffusers_paths_of_unknown_modules_stay() -> None:
    assert diffusers_paths(["input_blocks.0.0.weight"])("id_predictor.1") == "id_predictor.1"
