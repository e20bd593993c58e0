"""Tests of the names in diffusers' folders, against the released keys of every family."""

from __future__ import annotations

import json

import pytest

from ldm.checkpoint.diffusers_keys import (
    CLIP,
    OPEN_CLIP,
    PART_PREFIXES,
    Place,
    canonical,
    diffusers_origins,
    our_keys,
)
from ldm.checkpoint.keys import COND_STAGE, FIRST_STAGE, SCHEDULE_KEYS, TOWERS, UNET
from tests.conftest import ROOT

LISTS = ("sd_v1", "sd_v1_inpainting", "instruct_pix2pix", "sd_v2", "sdxl_base")


def released(name: str) -> list[str]:
    return list(json.loads((ROOT / f"tests/golden/{name}_keys.json").read_text())["keys"])


@pytest.mark.parametrize("name", LISTS)
def test_diffusers_origins_has_every_key_but_those_that_folders_lack(name: str) -> None:
    keys = released(name)
    found = diffusers_origins(keys)
    lacking = {key for key in keys if key not in found} - set(SCHEDULE_KEYS)
    # The last block of SD 2's text tower has 12 weights. The others have constant positions, and SDXL a scale too.
    assert len(lacking) == {"sd_v2": 14, "sdxl_base": 2}.get(name, 1)
    unused = ("logit_scale", "text_projection", "position_ids")
    assert all(key.endswith(unused) or ".resblocks.23." in key for key in lacking)
    places = [place for origin in found.values() for place in origin.places]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", LISTS)
def test_our_keys_is_the_inverse(name: str) -> None:
    origins = diffusers_origins(released(name))
    for prefix, part in PART_PREFIXES.items():
        own = {key: origin for key, origin in origins.items() if key.startswith(prefix)}
        theirs = {place.key: key for key, origin in own.items() for place in origin.places}
        kind = OPEN_CLIP if any(key.startswith(prefix + OPEN_CLIP) for key in own) else CLIP
        assert our_keys(prefix, kind, theirs) == theirs, part


# Names as released folders have them.
ANCHORS = {
    "sd_v1": {
        f"{UNET}time_embed.2.bias": ["unet:time_embedding.linear_2.bias"],
        f"{UNET}input_blocks.3.0.op.weight": ["unet:down_blocks.0.downsamplers.0.conv.weight"],
        f"{UNET}input_blocks.11.0.out_layers.3.weight": ["unet:down_blocks.3.resnets.1.conv2.weight"],
        f"{UNET}output_blocks.2.1.conv.weight": ["unet:up_blocks.0.upsamplers.0.conv.weight"],
        f"{UNET}output_blocks.8.2.conv.bias": ["unet:up_blocks.2.upsamplers.0.conv.bias"],
        f"{FIRST_STAGE}decoder.up.3.block.0.conv1.weight": ["vae:decoder.up_blocks.0.resnets.0.conv1.weight"],
        f"{FIRST_STAGE}decoder.up.0.block.0.nin_shortcut.bias": [
            "vae:decoder.up_blocks.3.resnets.0.conv_shortcut.bias"
        ],
        f"{FIRST_STAGE}encoder.down.2.downsample.conv.weight": ["vae:encoder.down_blocks.2.downsamplers.0.conv.weight"],
        f"{FIRST_STAGE}encoder.mid.attn_1.proj_out.weight": ["vae:encoder.mid_block.attentions.0.to_out.0.weight"],
        f"{FIRST_STAGE}encoder.mid.block_2.norm2.weight": ["vae:encoder.mid_block.resnets.1.norm2.weight"],
        f"{COND_STAGE}transformer.text_model.final_layer_norm.bias": ["text_encoder:text_model.final_layer_norm.bias"],
    },
    "sd_v2": {
        f"{COND_STAGE}model.transformer.resblocks.22.attn.in_proj_bias": [
            f"text_encoder:text_model.encoder.layers.22.self_attn.{letter}_proj.bias" for letter in "qkv"
        ],
        f"{COND_STAGE}model.positional_embedding": ["text_encoder:text_model.embeddings.position_embedding.weight"],
        f"{COND_STAGE}model.transformer.resblocks.0.mlp.c_proj.weight": [
            "text_encoder:text_model.encoder.layers.0.mlp.fc2.weight"
        ],
    },
    "sdxl_base": {
        f"{UNET}label_emb.0.2.weight": ["unet:add_embedding.linear_2.weight"],
        f"{UNET}input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight": [
            "unet:down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q.weight"
        ],
        f"{UNET}output_blocks.5.2.conv.weight": ["unet:up_blocks.1.upsamplers.0.conv.weight"],
        f"{TOWERS[1]}model.text_projection": ["text_encoder_2:text_projection.weight"],
        f"{TOWERS[1]}model.transformer.resblocks.31.ln_2.weight": [
            "text_encoder_2:text_model.encoder.layers.31.layer_norm2.weight"
        ],
    },
}


@pytest.mark.parametrize("name", ANCHORS)
def test_diffusers_origins_of_single_keys(name: str) -> None:
    found = diffusers_origins(released(name))
    for key, places in ANCHORS[name].items():
        assert found[key].places == tuple(Place(*place.split(":")) for place in places)
        assert found[key].is_transposed == key.endswith("text_projection")


@pytest.mark.parametrize("older", ["query", "to_q"])
def test_canonical_names_of_attention(older: str) -> None:
    assert canonical("vae", f"encoder.mid_block.attentions.0.{older}.weight") == (
        "encoder.mid_block.attentions.0.to_q.weight"
    )
    assert canonical("vae", "decoder.mid_block.attentions.0.proj_attn.bias") == (
        "decoder.mid_block.attentions.0.to_out.0.bias"
    )
    assert canonical("text_encoder", "encoder.layers.0.mlp.fc1.bias") == "text_model.encoder.layers.0.mlp.fc1.bias"
