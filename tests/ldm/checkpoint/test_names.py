"""Names of other programs become ours, and ours theirs."""

import re

import pytest
import torch

from ldm.checkpoint import Pending, ema_key
from ldm.checkpoint.names import in_our_names, is_carried

UNET = "model.diffusion_model."
VAE = "first_stage_model.encoder."
TOWER = "cond_stage_model.transformer."
XL = "conditioner.embedders.0.transformer."

PAIRS = [
    ("input_blocks.0.0.weight", f"{UNET}input_blocks.0.0.weight"),
    ("diffusion_model.out.2.bias", f"{UNET}out.2.bias"),
    ("time_embed.0.weight", f"{UNET}time_embed.0.weight"),
    ("label_emb.0.0.weight", f"{UNET}label_emb.0.0.weight"),
    ("module.model.diffusion_model.out.0.weight", f"{UNET}out.0.weight"),
    ("state_dict.model.diffusion_model.out.0.weight", f"{UNET}out.0.weight"),
    ("model._orig_mod.diffusion_model.out.0.weight", f"{UNET}out.0.weight"),
    ("model.module.diffusion_model.out.0.weight", f"{UNET}out.0.weight"),
    (f"{UNET}_fsdp_wrapped_module.out._checkpoint_wrapped_module.0.bias", f"{UNET}out.0.bias"),
    (f"{TOWER}encoder.layers.0.mlp.fc1.bias", f"{TOWER}text_model.encoder.layers.0.mlp.fc1.bias"),
    (f"{XL}encoder.layers.0.mlp.fc1.bias", f"{XL}text_model.encoder.layers.0.mlp.fc1.bias"),
    (f"{VAE}mid.attn_1.to_out.0.bias", f"{VAE}mid.attn_1.proj_out.bias"),
    (f"{VAE}down.2.attn.1.query.weight", f"{VAE}down.2.attn.1.q.weight"),
    ("decoder.mid.attn_1.group_norm.bias", "decoder.mid.attn_1.norm.bias"),
]
SAME = [
    *(f"{UNET}output_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", f"{TOWER}text_model.final_layer_norm.bias"),
    *(f"{VAE}mid.attn_1.q.bias", "cond_stage_model.model.ln_final.weight", "conditioner.embedders.0.weight", "betas"),
]


@pytest.mark.parametrize(("theirs", "ours"), [*PAIRS, *((key, key) for key in SAME)])
def test_in_our_names_renames_and_restored_gives_the_names_back(theirs, ours):
    weights = {theirs: torch.ones(2)}
    named = in_our_names(weights, ["decoder.conv_in.weight"])
    assert list(named.weights) == [ours] and named.origins == {ours: theirs} and named.carried == []
    assert named.restored(named.weights) == weights
    assert bool(named.summary()) == (theirs != ours)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_in_our_names_prefers_the_exact_name(theirs, ours):
    for order in ((theirs, ours), (ours, theirs)):
        weights = {key: torch.full((2,), float(key == ours)) for key in order}
        named = in_our_names(weights, ["decoder.conv_in.weight"])
        assert named.weights[ours].tolist() == [1, 1] and named.carried == [theirs]
        assert named.restored(named.weights) == weights


def test_in_our_names_keeps_the_names_of_the_model():
    assert list(in_our_names({"input_blocks.0.weight": torch.ones(1)}, ["input_blocks.0.weight"]).weights) == [
        "input_blocks.0.weight"
    ]


def test_summary_leaves_out_the_markers_of_v_prediction():
    names = in_our_names({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0), "other.x": torch.zeros(1)})
    assert names.summary() == ["1 values are not used: other"] and len(names.carried) == 3


def test_restored_gives_linear_layers_their_shape_back_and_adds_new_keys():
    named = in_our_names({f"{VAE}mid.attn_1.to_q.weight": torch.ones(3, 2)})
    (key,) = named.weights
    assert named.weights[key].shape == (3, 2, 1, 1)
    changed = Pending((3, 2, 1, 1), torch.float32, lambda: torch.zeros(3, 2, 1, 1))
    restored = named.restored({key: changed, "betas": torch.ones(2)})
    assert list(restored) == [f"{VAE}mid.attn_1.to_q.weight", "betas"]
    value = restored[f"{VAE}mid.attn_1.to_q.weight"]
    assert value.shape == (3, 2) and torch.equal(value.compute(), torch.zeros(3, 2))


def test_averages_become_the_weights_only_where_there_are_no_others():
    key = f"{UNET}out.0.weight"
    alone = {ema_key(key): torch.ones(1), "model_ema.decay": torch.tensor(0.9)}
    assert in_our_names(alone, [key]).origins[key] == ema_key(key)
    assert in_our_names({**alone, key: torch.zeros(1)}, [key]).origins[key] == key


@pytest.mark.parametrize(
    "key",
    [
        *(
            "embedding_manager.x",
            "lora_te_x.alpha",
            f"{UNET}out.0.lora_up.weight",
            "control_model.x",
            "v_pred",
            "ztsnr",
        ),
        *("denoiser.sigmas", "first_stage_model.model_ema.decay", "first_stage_model.ema.x", "something.new"),
        *("cond_stage_model.logit_scale", f"{TOWER}vision_model.x", f"{TOWER}text_projection.weight"),
    ],
)
def test_is_carried(key):
    assert is_carried(key)
    assert in_our_names({key: torch.ones(1)}).carried == [key]
    assert in_our_names({key: torch.ones(1)}, [key]).carried == []


@pytest.mark.parametrize("key", [*SAME, f"{UNET}new.weight", "first_stage_model.new", "logvar", "model_ema.decay"])
def test_is_carried_leaves_the_parts_of_a_model(key):
    assert not is_carried(key)


OWN = [
    *(f"{UNET}input_blocks.1.1.attn1.to_q.weight", f"{UNET}out.2.bias", f"{VAE}mid.attn_1.q.weight"),
    *(f"{VAE}up.0.block.0.norm1.weight", f"{TOWER}text_model.encoder.layers.0.fc1.weight"),
]


@pytest.mark.parametrize(
    "key",
    [
        *(f"{UNET}position_net.linears.0.weight", f"{UNET}input_blocks.1.1.fuser.attn1.to_q.weight"),
        *(f"{UNET}out.2.alpha", f"{UNET}out.2.dora_scale", f"{UNET}input_blocks.1.1.attn1.to_k_ip.weight"),
        *("first_stage_model.new.weight", f"{TOWER}text_model.pooler.weight"),
    ],
)
def test_in_our_names_carries_what_other_programs_put_into_the_parts(key):
    file = {**dict.fromkeys(OWN, torch.ones(1)), key: torch.ones(1)}
    named = in_our_names(file, OWN)
    assert named.carried == [key] and list(named.restored(named.weights)) == list(file)
    assert re.sub(r"\d+", "*", key) in named.summary()[0]
    assert in_our_names(file, [*OWN, key]).carried == []
    is_known = any(word in key for word in ("position_net", "fuser", "alpha", "dora_scale", "to_k_ip"))
    assert in_our_names({key: torch.ones(1)}, OWN).carried == [key] * is_known  # else the part is another one


@pytest.mark.parametrize(
    "key",
    [
        *(f"{UNET}input_blocks.2.1.attn1.to_q.weight", f"{UNET}input_blocks.1.1.attn1.to_q.bias"),
        *(f"{VAE}up.0.attn.0.q.weight", f"{TOWER}text_model.encoder.layers.12.fc1.weight"),
        *(f"{UNET}label_emb.0.0.weight", f"{UNET}out.2.weight_scale", "model_ema.decay", "conditioner.new.weight"),
    ],
)
def test_in_our_names_carries_nothing_that_means_another_model(key):
    assert in_our_names({**dict.fromkeys(OWN, torch.ones(1)), key: torch.ones(1)}, OWN).carried == []
