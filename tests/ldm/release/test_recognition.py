"""The families of released checkpoints, told apart by the lists of released keys."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ldm.checkpoint.keys import (
    COND_STAGE,
    CONDITIONER,
    EDM_MARKERS,
    EMA,
    SCHEDULE_KEYS,
    UNET,
    V_PREDICTION,
    ZERO_SNR,
    ema_key,
)
from ldm.config.load import build_model, find_config, load_config
from ldm.release.families import FAMILIES
from ldm.release.recognition import (
    check_same_family,
    find_family,
    log_family,
    recognise,
    shapes_of,
    warn_of_new_prediction,
)
from ldm.util import UserError
from tests.golden_data import released_keys

FIRST = f"{UNET}input_blocks.0.0.weight"
LISTS = {
    "sd1": "sd_v1_keys",
    "sd1_inpainting": "sd_v1_inpainting_keys",
    "instruct_pix2pix": "instruct_pix2pix_keys",
    "sd2_768_v": "sd_v2_keys",
    "sdxl": "sdxl_base_keys",
}
# Families without a list of their own: the list that they differ from in the first convolution alone.
SIBLINGS = {"sd2_inpainting": "sd_v2_keys", "sd2_depth": "sd_v2_keys", "sdxl_inpainting": "sdxl_base_keys"}


def shapes_for(key: str) -> dict[str, tuple[int, ...]]:
    if key in LISTS:
        return released_keys(file=LISTS[key])
    return {**released_keys(file=SIBLINGS[key]), FIRST: (320, FAMILIES[key].in_channels, 3, 3)}


KNOWN = pytest.mark.parametrize("key", [*LISTS, *SIBLINGS])


def without(shapes: dict[str, tuple[int, ...]], *prefixes: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if not key.startswith(prefixes)}


@KNOWN
def test_recognise_knows_released_keys(key: str) -> None:
    shapes = shapes_for(key)
    assert recognise(shapes) is FAMILIES[key]
    assert FAMILIES[key].shapes.items() <= shapes.items()
    assert any(name.startswith(FAMILIES[key].encoders) for name in shapes)


@KNOWN
def test_recognise_needs_no_schedule_no_encoders_and_minds_no_ema(key: str) -> None:
    shapes = shapes_for(key)
    averaged = {ema_key(name): shape for name, shape in shapes.items() if name.startswith(UNET)}
    assert recognise({**shapes, **averaged, f"{EMA}decay": (), "denoiser.sigmas": (1000,)}) is FAMILIES[key]
    assert recognise(without(shapes, *SCHEDULE_KEYS)) is FAMILIES[key]
    assert recognise(without(shapes, COND_STAGE, CONDITIONER)) is FAMILIES[key]
    assert recognise(averaged) is FAMILIES[key]


@KNOWN
@pytest.mark.parametrize("prefix", ["module.", "_forward_module.model."])
def test_recognise_takes_an_outer_prefix_off(key: str, prefix: str) -> None:
    assert recognise({prefix + name: shape for name, shape in shapes_for(key).items()}) is FAMILIES[key]


@KNOWN
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_recognise_knows_a_UNet_alone(key: str, prefix: str) -> None:
    unet = {name: shape for name, shape in shapes_for(key).items() if name.startswith(UNET)}
    assert recognise({prefix + name.removeprefix(UNET): shape for name, shape in unet.items()}) is FAMILIES[key]


def test_recognise_prefers_the_UNet_to_a_control_network() -> None:
    control = {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
    assert recognise({**control, **shapes_for("sd1_inpainting")}) is FAMILIES["sd1_inpainting"]


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({}, "sd2_768_v"),
        ({"size": 768}, "sd2_768_v"),
        ({"size": 1024}, "sd2_768_v"),
        ({"size": 512}, "sd2_base"),
        ({"size": 256}, "sd2_base"),
        ({"parameterization": "eps"}, "sd2_base"),
        ({"parameterization": "eps", "size": 768}, "sd2_base"),
        ({"parameterization": "v", "size": 512}, "sd2_768_v"),
    ],
)
def test_recognise_tells_v_prediction_by_argument_then_size(asked: dict, key: str) -> None:
    assert recognise(shapes_for("sd2_768_v"), **asked) == FAMILIES[key]


def test_recognise_says_which_and_that_another_has_the_same_keys(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        recognise(shapes_for("sd2_768_v"), source="a.ckpt")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("a.ckpt: Stable Diffusion 2 768-v (768 pixels, predicts v); ")
    assert "Stable Diffusion 2 base (512 pixels, predicts the noise)" in line
    assert line.endswith("give --parameterization eps")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        recognise(shapes_for("sd2_768_v"), parameterization="eps")
        recognise(shapes_for("sd1"))
    assert "--parameterization" not in caplog.text


@pytest.mark.parametrize("key", ["sdxl", "sdxl_inpainting"])
def test_recognise_reads_the_marks_of_v_prediction(key: str, caplog: pytest.LogCaptureFixture) -> None:
    shapes = {**shapes_for(key), V_PREDICTION: ()}
    predicts_v = replace(FAMILIES[key], parameterization="v")
    with caplog.at_level(logging.INFO):
        assert recognise(shapes) == predicts_v
        assert recognise({**shapes, ZERO_SNR: ()}) == replace(predicts_v, zero_snr=True)
    assert "predicts v, with zero terminal SNR" in caplog.text
    assert recognise({**shapes, ZERO_SNR: ()}, parameterization="eps") == FAMILIES[key]
    assert recognise(shapes_for(key), parameterization="v") == predicts_v


def test_recognise_reads_zero_terminal_snr_where_the_default_predicts_v() -> None:
    marked = {**shapes_for("sd2_768_v"), ZERO_SNR: ()}
    assert recognise(marked) == replace(FAMILIES["sd2_768_v"], zero_snr=True)
    assert recognise(marked, size=512) is FAMILIES["sd2_base"]
    assert recognise({**shapes_for("sdxl"), ZERO_SNR: ()}) is FAMILIES["sdxl"]


@pytest.mark.parametrize("marker", EDM_MARKERS)
def test_recognise_refuses_another_noise_schedule(marker: str) -> None:
    with pytest.raises(UserError, match=f"x.ckpt: holds {marker}, the marker of an EDM noise schedule"):
        recognise({**shapes_for("sdxl"), marker: ()}, source="x.ckpt")


def test_find_family_and_log_family_know_no_family_of_others(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert find_family({FIRST: (32, 4, 3, 3)}) is None
        assert log_family({FIRST: (32, 4, 3, 3)}, "x.ckpt", "eps") is None
        assert log_family(shapes_for("sd1"), "x.ckpt", "x0") is None
        assert not caplog.records
        assert log_family(shapes_for("sd2_768_v"), "x.ckpt", "eps") is FAMILIES["sd2_base"]
    assert [record.getMessage() for record in caplog.records] == [f"x.ckpt: {FAMILIES['sd2_base'].described()}"]


@pytest.mark.parametrize(
    ("key", "marks", "predicts", "warns"),
    [
        ("sd1", (), "v", True),
        ("sd1", (), "eps", False),
        ("sd1", (V_PREDICTION,), "v", False),
        ("sd2_768_v", (), "v", False),  # the same keys as those of the base, which predicts eps
    ],
)
def test_warn_of_new_prediction(
    caplog: pytest.LogCaptureFixture, key: str, marks: tuple[str, ...], predicts: str, warns: bool
) -> None:
    shapes = {**shapes_for(key), **dict.fromkeys(marks, (0,))}
    warn_of_new_prediction(shapes, "a.ckpt", predicts)
    assert ("a.ckpt: predicts eps, but parameterization is v" in caplog.text) == warns


def test_check_same_family_names_both() -> None:
    for key in (*LISTS, *SIBLINGS):
        check_same_family(shapes_for(key), without(shapes_for(key), COND_STAGE, CONDITIONER), "x.ckpt")
        check_same_family(shapes_for(key), {"model.w": (3,)}, "x.ckpt")
    for release, training, config in (("sdxl", "sd1", "_xl.yaml"), ("sd1_inpainting", "sd1", "_v1_inpainting.yaml")):
        with pytest.raises(UserError) as caught:
            check_same_family(shapes_for(release), shapes_for(training), "x.ckpt")
        said = str(caught.value)
        assert said.startswith(f"x.ckpt: is {FAMILIES[release].name}, the training is of {FAMILIES[training].name}; ")
        assert said.endswith(config) and "\n" not in said
    with pytest.raises(UserError, match="is Stable Diffusion 2 768-v or Stable Diffusion 2 base, the training"):
        check_same_family(shapes_for("sd2_768_v"), shapes_for("sd1"), "x.ckpt")


def test_overrides_make_the_config_of_what_recognise_found() -> None:
    assert [family.overrides for family in FAMILIES.values()] == [[]] * len(FAMILIES)
    marked = {**shapes_for("sdxl"), V_PREDICTION: (), ZERO_SNR: ()}
    overrides = recognise(marked).overrides
    assert overrides == ["model.params.parameterization=v", "model.params.rescale_betas_zero_snr=true"]
    config = load_config([FAMILIES["sdxl"].config], overrides)
    config.model.params.unet_config.params |= {"model_channels": 32, "num_classes": None}
    config.model.params.cond_stage_config = "__is_unconditional__"
    model = build_model(config)
    assert model.parameterization == "v" and model.alphas_cumprod[-1] == 0


def refused(shapes: dict, **kwargs: str) -> str:
    with pytest.raises(UserError) as error:
        recognise(shapes, source="b.safetensors", **kwargs)
    message = str(error.value)
    assert "\n" not in message and message.startswith("b.safetensors: ") and "--config" in message
    return message


@pytest.mark.parametrize("key", ["sd1", "sd2_768_v", "sdxl"])
def test_recognise_refuses_other_input_channels(key: str) -> None:
    message = refused({**shapes_for(key), FIRST: (320, 7, 3, 3)})
    assert FAMILIES[key].name in message
    assert f"{FIRST} (found (320, 7, 3, 3), expected (320, 4, 3, 3))" in message and "…" not in message


@KNOWN
def test_recognise_refuses_a_missing_transformer_block(key: str) -> None:
    message = refused(without(shapes_for(key), f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k"))
    assert FAMILIES[key].name in message
    assert f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight (found none, " in message


def test_recognise_refuses_one_transformer_block_more() -> None:
    more = f"{UNET}middle_block.1.transformer_blocks.10.attn2.to_k.weight"
    assert f"{more} (found (1280, 2048), expected none)" in refused({**shapes_for("sdxl"), more: (1280, 2048)})


@pytest.mark.parametrize("width", [1280, 640])
def test_recognise_refuses_another_context(width: int) -> None:
    shapes = shapes_for("sdxl")
    narrow = {key: (shape[0], width) for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")}
    message = refused({**shapes, **narrow})
    assert "Stable Diffusion XL," in message and f"{width}), expected (640, 2048)" in message and "keys)" in message


def test_recognise_refuses_label_embeddings_where_the_family_has_none() -> None:
    labels = f"{UNET}label_emb.weight"  # the upscaler's: one row per level of noise
    message = refused({**shapes_for("sd2_768_v"), labels: (1000, 1280)})
    assert f"{labels} (found (1000, 1280), expected none)" in message and "Stable Diffusion 2" in message
    assert f"{UNET}label_emb.0.0.weight (found none" in refused(without(shapes_for("sdxl"), f"{UNET}label_emb"))


def test_recognise_refuses_the_text_encoder_of_another_family() -> None:
    v1 = {key: shape for key, shape in shapes_for("sd1").items() if key.startswith(COND_STAGE)}
    message = refused({**without(shapes_for("sd2_768_v"), COND_STAGE), **v1})
    assert "Stable Diffusion 2" in message and "token_embedding.weight" in message
    swapped = {key.replace(COND_STAGE, CONDITIONER): shape for key, shape in shapes_for("sd1").items()}
    assert CONDITIONER in refused(swapped)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["lora_unet_down_blocks_0_proj_in.lora_down.weight"], "is a LoRA: give it by --lora"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is an autoencoder alone: give it by --vae"),
        (["down_blocks.0.attentions.0.norm.weight"], "has the layout of diffusers"),
    ],
)
def test_recognise_names_other_kinds_of_files(keys: list[str], kind: str) -> None:
    with pytest.raises(UserError, match=f"^b.safetensors: the file {kind}") as error:
        recognise(dict.fromkeys(keys, (1,)), source="b.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shapes", [{}, {"encoder.conv_in.weight": (128, 3, 3, 3)}, {FIRST: ()}])
def test_recognise_refuses_what_is_no_model(shapes: dict) -> None:
    assert "keys)" in refused(shapes)


def test_recognise_refuses_another_parameterization() -> None:
    with pytest.raises(UserError, match="parameterization 'x0': choose eps or v"):
        recognise(shapes_for("sd1"), parameterization="x0")


def test_shapes_of_reads_whatever_has_a_shape() -> None:
    assert shapes_of({"a": SimpleNamespace(shape=[2, 3]), "global_step": 7}) == {"a": (2, 3)}


def test_FAMILIES_name_configs_that_exist() -> None:
    for key, family in FAMILIES.items():
        assert family.key == key
        for name in (family.config, family.finetune_config):
            assert find_config(name).name == name
