"""Weights have one digest in whatever file they come, and other weights another."""

import hashlib

import numpy as np
import torch

from ldm.checkpoint import (
    USED_AUTOENCODER,
    USED_TOWER,
    encoder_digests,
    load_state_dict,
    save_state_dict,
    weights_digest,
)

WEIGHTS = {"a.b.weight": torch.tensor([[0.1, 2.0, -3.5]]), "a.a": torch.tensor([7], dtype=torch.int32)}


def test_what_is_hashed_is_written_down():
    values = np.array([[0.1, 2.0, -3.5]], "<f2")
    said = b"a (1,)\n" + np.array([7], "<i8").tobytes() + b"b.weight (1, 3)\n" + values.tobytes()
    assert weights_digest(WEIGHTS, "a.") == hashlib.sha256(said).hexdigest()


def test_file_order_and_precision_do_not_count(tmp_path):
    digest = weights_digest(WEIGHTS, "a.")
    half = {key: value.half() if value.is_floating_point() else value for key, value in WEIGHTS.items()}
    for number, weights in enumerate((WEIGHTS, half, dict(reversed(WEIGHTS.items())))):
        for suffix in ("ckpt", "safetensors"):
            path = tmp_path / f"{number}.{suffix}"
            save_state_dict(weights, path)
            assert weights_digest(load_state_dict(path), "a.") == digest
    rest = {"a.loss.w": torch.ones(2), "a.position_ids": torch.arange(3), "model.w": torch.ones(2)}
    assert weights_digest({**WEIGHTS, **rest}, "a.") == digest


def test_values_shapes_and_names_count():
    digest = weights_digest(WEIGHTS, "a.")
    weight = WEIGHTS["a.b.weight"]
    for other in (
        {"a.b.weight": weight + 0.01},
        {"a.b.weight": weight.T},
        {"a.b.weight": weight[0]},
        {"a.b.weight": weight, "a.c": weight},
    ):
        assert weights_digest({**WEIGHTS, **other}, "a.") not in (digest, None)
    assert weights_digest({"a.c.weight": weight, "a.a": WEIGHTS["a.a"]}, "a.") != digest


def test_no_weights_and_weights_that_lost_bits_have_none():
    assert weights_digest(WEIGHTS, "b.") is None
    assert weights_digest({key: value.bfloat16() for key, value in WEIGHTS.items()}) is None


def test_the_encoders_of_a_release():
    weights = {"first_stage_model.w": torch.ones(2), "cond_stage_model.w": torch.zeros(2), "model.w": torch.ones(3)}
    own = {"autoencoder": weights_digest({"w": torch.ones(2)}), "text_tower": weights_digest({"w": torch.zeros(2)})}
    assert encoder_digests(weights) == own
    optional = {"cond_stage_model.model.logit_scale": torch.tensor(3.0)}  # which files may lack
    assert encoder_digests({**weights, **optional}) == own
    assert encoder_digests({"model.w": torch.ones(3)}) == {"autoencoder": None, "text_tower": None}


def test_each_of_two_text_towers_has_a_digest():
    towers = {"conditioner.embedders.0.w": torch.zeros(2), "conditioner.embedders.1.model.w": torch.ones(2)}
    own = {
        "text_tower": weights_digest({"w": torch.zeros(2)}),
        "text_tower_2": weights_digest({"model.w": torch.ones(2)}),
    }
    assert encoder_digests(towers) == {"autoencoder": None, **own}
    logit_scale = {"conditioner.embedders.1.model.logit_scale": torch.tensor(3.0)}  # which no output needs
    assert encoder_digests({**towers, **logit_scale}) == {"autoencoder": None, **own}
    projection = {"conditioner.embedders.1.model.text_projection": torch.ones(2, 2)}
    assert encoder_digests({**towers, **projection})["text_tower_2"] != own["text_tower_2"]


def test_the_used_part_of_sd_2s_text_tower_has_a_digest_of_its_own():
    """Folders of diffusers hold zeros in place of the last block."""
    blocks = "cond_stage_model.model.transformer.resblocks."
    tower = {f"{blocks}{number}.ln_1.weight": torch.full((2,), float(number + 1)) for number in range(3)}
    digests = encoder_digests(tower)
    other = encoder_digests({**tower, f"{blocks}2.ln_1.weight": torch.zeros(2)})
    assert digests[USED_TOWER] == other[USED_TOWER] and digests["text_tower"] != other["text_tower"]
    assert encoder_digests({**tower, f"{blocks}1.ln_1.weight": torch.zeros(2)})[USED_TOWER] != digests[USED_TOWER]


def test_the_encoder_of_an_autoencoder_has_a_digest_of_its_own():
    """A new decoder leaves the samples of a set as they are."""
    parts = ("encoder", "quant_conv", "decoder", "post_quant_conv")
    weights = {f"first_stage_model.{part}.weight": torch.ones(2) for part in parts}
    digests = encoder_digests(weights)
    for part in parts:
        other = encoder_digests({**weights, f"first_stage_model.{part}.weight": torch.zeros(2)})
        assert other["autoencoder"] != digests["autoencoder"]
        assert (other[USED_AUTOENCODER] == digests[USED_AUTOENCODER]) == (part in ("decoder", "post_quant_conv"))
