"""Tests of reading diffusers' folders: every layout of their files, and one line about damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import in_memory, load_state_dict, open_checkpoint, save_state_dict
from ldm.checkpoint.formats import same_values
from ldm.checkpoint.keys import COND_STAGE
from ldm.checkpoint.mapped import Joined
from ldm.util import UserError
from tests.diffusers_folders import (
    TEXT,
    UNET,
    VAE,
    copied,
    edit_json,
    edit_weights,
    rewrite,
    shard,
    write_tiny_folder,
)

FUSED = f"{COND_STAGE}model.transformer.resblocks.0.attn.in_proj_weight"


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder("sd2_768_v", tmp_path_factory.mktemp("sd2"))[0]


@pytest.fixture
def folder(sd2: Path, tmp_path: Path) -> Path:
    return copied(sd2, tmp_path / "model")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_values(in_memory(one[key]), in_memory(other[key])) for key in one)


def renamed_attention(folder: Path) -> None:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_state_dict(folder / VAE)
    for today, name in older.items():
        weights = {key.replace(f".{today}.", f".{name}."): value for key, value in weights.items()}
    rewrite(folder / VAE, weights)


def convolutions(folder: Path) -> None:
    weights = load_state_dict(folder / VAE)
    rewrite(
        folder / VAE, {key: v[:, :, None, None] if ".to_" in key and v.ndim == 2 else v for key, v in weights.items()}
    )


def pickles(folder: Path) -> None:
    for name, new in ((UNET, UNET), (VAE, VAE), (TEXT, "text_encoder/pytorch_model.safetensors")):
        rewrite((folder / new).with_suffix(".bin"), load_state_dict(folder / name))
        (folder / name).unlink()


def variants(folder: Path) -> None:
    for name in (UNET, VAE, TEXT):
        (folder / name).rename((folder / name).with_suffix(".fp16.safetensors"))


def without_prefix(folder: Path) -> None:
    weights = load_state_dict(folder / TEXT)
    positions = {"embeddings.position_ids": torch.arange(77)[None]}
    rewrite(folder / TEXT, {key.removeprefix("text_model."): value for key, value in weights.items()} | positions)


def links(folder: Path) -> None:
    """Replace files by links to blobs outside the folder, as in the cache of huggingface_hub."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "as written": lambda folder: None,
    "without index": lambda folder: (folder / "model_index.json").unlink(),
    "shards": lambda folder: shard(folder / UNET, 3),
    "old attention": renamed_attention,
    "convolutions": convolutions,
    "pickles": pickles,
    "variants": variants,
    "links": links,
    "text tower alone": without_prefix,
    "both": lambda folder: rewrite((folder / UNET).with_suffix(".fp16.safetensors"), {"x": torch.ones(1)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_folder_takes_every_layout(layout: str, sd2: Path, folder: Path) -> None:
    LAYOUTS[layout](folder)
    assert same(load_state_dict(folder), load_state_dict(sd2))


def test_weights_are_those_of_the_release_and_stay_on_disk(sd2: Path) -> None:
    found, released = load_state_dict(sd2), load_state_dict(sd2.with_name("sd2_768_v.safetensors"))
    block = {key for key in released if "resblocks.1." in key}  # the last, which folders lack
    assert released.keys() - found.keys() >= {"betas", f"{COND_STAGE}model.text_projection"}
    assert same({k: v for k, v in found.items() if k not in block}, {k: released[k] for k in found if k not in block})
    assert all(found[key].shape == released[key].shape and not found[key].any() for key in block)
    assert isinstance(found[FUSED], Joined) and torch.equal(found[FUSED], released[FUSED])
    assert torch.equal(found[FUSED][3:40] + 1, released[FUSED][3:40] + 1)  # as any tensor


@pytest.mark.parametrize(("stated", "predicts"), [("v_prediction", "v"), ("epsilon", "epsilon")])
def test_the_scheduler_tells_the_prediction(folder: Path, stated: str, predicts: str) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type=stated)
    assert open_checkpoint(folder).metadata["modelspec.prediction_type"] == predicts


def test_the_metadata_are_those_of_the_unet_first(folder: Path) -> None:
    for place, title in ((UNET, "Cats"), (VAE, "An autoencoder")):
        weights = {key: in_memory(value) for key, value in load_state_dict(folder / place).items()}
        (folder / place).unlink()
        save_state_dict(weights, folder / place, metadata={"modelspec.title": title, title: "1"})
    metadata = open_checkpoint(folder).metadata
    assert metadata["modelspec.title"] == "Cats" and metadata["An autoencoder"] == "1"


def test_zero_terminal_snr_becomes_markers(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    assert {"v_pred", "ztsnr"} <= load_state_dict(folder).keys()


def test_another_schedule_gives_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", beta_end=0.02)
    open_checkpoint(folder)
    assert "scheduler_config.json: the noise schedule (beta_end 0.02) differs" in caplog.text


def test_a_part_alone(folder: Path) -> None:
    assert all(key.startswith("first_stage_model.") for key in load_state_dict(folder / "vae"))
    assert all(key.startswith("model.diffusion_model.") for key in load_state_dict(folder / "unet"))


def edit_index(folder: Path, key: str, name: str | None) -> None:
    path = shard(folder / UNET)
    content = json.loads(path.read_text())
    content["weight_map"][key] = name or content["weight_map"]["conv_in.bias"]
    path.write_text(json.dumps(content))


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


QUERY = "text_model__encoder__layers__0__self_attn__q_proj__weight"
INDEX = "model_index.json"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "part": (lambda f: shutil.rmtree(f / "vae"), r"vae: no such folder, but model_index.json names it"),
    "weights": (lambda f: (f / UNET).unlink(), r"unet: holds no weights of diffusers"),
    "config": (lambda f: (f / "unet/config.json").unlink(), r"unet/config.json: no such file"),
    "empty config": (lambda f: edit_text(f / "vae/config.json", ""), r"vae/config.json: is not valid JSON"),
    "list": (lambda f: edit_text(f / INDEX, "[]"), r"model_index.json: holds list, not a JSON object"),
    "shard": (
        lambda f: next((shard(f / UNET).parent).glob("*00002-of*")).unlink(),
        r"00002-of-00002.safetensors: no such file, but",
    ),
    "no index": (lambda f: shard(f / UNET).unlink(), r"unet: has .*00001-of-00002.safetensors, and no index"),
    "outside": (lambda f: edit_index(f, "conv_in.bias", "../vae/x.safetensors"), r"not in its folder"),
    "absolute": (lambda f: edit_index(f, "conv_in.bias", "/etc/passwd"), r"not in its folder"),
    "absent key": (lambda f: edit_index(f, "conv_in.other", None), r"names conv_in.other in .*, which lacks it"),
    "no map": (lambda f: edit_json(shard(f / UNET), weight_map=3), r"has no weight_map"),
    "truncated": (lambda f: cut(f / TEXT), r"text_encoder/model.safetensors: damaged or truncated"),
    "shape": (
        lambda f: edit_weights(f / UNET, conv_in__weight=torch.ones(32, 5, 3, 3)),
        r"unet/config.json: in_channels is 4, but the weights have 5",
    ),
    "query": (lambda f: edit_weights(f / TEXT, **{QUERY: torch.ones(3, 24)}), r"q_proj.weight, .* differ in shape"),
    "no query": (lambda f: edit_weights(f / TEXT, **{QUERY: None}), r"lacks text_model.*self_attn.q_proj.weight"),
    "two names": (
        lambda f: edit_weights(f / VAE, encoder__mid_block__attentions__0__query__bias=torch.ones(32)),
        r"holds encoder.mid_block.attentions.0.to_q.bias under two names",
    ),
    "other key": (lambda f: edit_weights(f / UNET, adapter__x=torch.ones(1)), r"holds adapter.x, which no model here"),
    "width": (lambda f: edit_json(f / "unet/config.json", cross_attention_dim=9), r"cross_attention_dim is 9, but"),
    "levels": (lambda f: edit_json(f / "vae/config.json", layers_per_block=7), r"layers_per_block is 7, but"),
    "activation": (lambda f: edit_json(f / "unet/config.json", act_fn="gelu"), r"act_fn is 'gelu', and the networks"),
    "latents": (lambda f: edit_json(f / "vae/config.json", latents_mean=[1.0]), r"vae/config.json: latents_mean is"),
    "tower": (lambda f: edit_json(f / "text_encoder/config.json", hidden_act="relu"), r"hidden_act 'relu' is not of"),
    "T5": (
        lambda f: edit_json(f / "text_encoder/config.json", architectures=["T5EncoderModel"]),
        r"text_encoder/config.json: is of a T5EncoderModel; this program takes CLIPTextModel",
    ),
    "prediction": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="sample"),
        r"prediction_type 'sample': this program takes epsilon or v_prediction",
    ),
    "EDM": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"),
        r"is of a EDMEulerScheduler, another kind of noise schedule",
    ),
    "variants": (
        lambda f: [
            (f / UNET).rename((f / UNET).with_suffix(".ema.safetensors")),
            shutil.copy((f / UNET).with_suffix(".ema.safetensors"), (f / UNET).with_suffix(".non_ema.safetensors")),
        ],
        r"unet: holds the variants ema, non_ema; rename one",
    ),
}


def edit_text(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_gives_one_line(damage: str, folder: Path) -> None:
    make, message = DAMAGES[damage]
    make(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("FluxPipeline", "transformer"),
        ("StableDiffusion3Pipeline", "transformer"),
        ("StableCascadeCombinedPipeline", "prior"),
    ],
)
def test_folders_of_other_models_are_refused(kind: str, network: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"_class_name": kind, network: ["diffusers", "X"], "vae": ["d", "Y"]}))
    with pytest.raises(UserError, match=f"is a {kind} with a {network}; this program takes the UNets of"):
        open_checkpoint(tmp_path)


def test_a_video_model_is_refused(folder: Path) -> None:
    edit_json(folder / "unet/config.json", _class_name="UNetSpatioTemporalConditionModel")
    with pytest.raises(UserError, match="is of a UNetSpatioTemporalConditionModel; this program takes UNet2DCond"):
        open_checkpoint(folder)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder, and none of diffusers; name the"):
        open_checkpoint(tmp_path)
