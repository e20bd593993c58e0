"""Releases in the layouts of other programs: the same model as the plain file, and merged files in the same layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import encoder_digests, load_checkpoint, load_state_dict, save_checkpoint, save_state_dict
from ldm.checkpoint.formats import as_bytes
from ldm.release.configs import training_config
from ldm.release.hack import hack_config, hack_training
from ldm.release.load import load_release
from ldm.release.merge import merge_files
from ldm.release.opening import open_release, read_autoencoder
from ldm.training.resume import read_training_checkpoint
from ldm.util import UserError
from tests.conftest import RELEASE_CONFIG
from tests.release_layouts import LAYOUTS, bare_unet, extras, flat_clip, linear_attention

MOVED = "first_stage_model.decoder.mid.attn_1.q.weight"
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def plain(tiny_release: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(tiny_release)


@pytest.fixture(scope="module")
def training(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training from the plain release that moved one weight of each part."""
    path = tmp_path_factory.mktemp("training") / "last.ckpt"
    hack_config(training_config(tiny_release, [RELEASE_CONFIG]), tiny_release, path)
    content = load_checkpoint(path)
    weights = content["state_dict"]
    for key in moved_keys(weights):
        weights[key] = weights[key] + 1
    trained = path.with_name("trained.ckpt")
    save_checkpoint({**content, "state_dict": weights}, trained)
    return trained


@pytest.fixture(scope="module")
def loaded(tiny_release: Path) -> dict[str, torch.Tensor]:
    """The state of the model that the plain release gives."""
    return load_release(tiny_release, RELEASE_CONFIG).state_dict()


def moved_keys(weights: dict[str, torch.Tensor]) -> list[str]:
    return [MOVED, f"{UNET}out.2.weight", "cond_stage_model.transformer.text_model.final_layer_norm.weight"]


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(as_bytes(one), as_bytes(other))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_release_gives_the_plain_weights(layout: str, plain: dict, loaded: dict, tmp_path: Path) -> None:
    save_state_dict(LAYOUTS[layout](plain), tmp_path / "r.ckpt")
    found = load_release(tmp_path / "r.ckpt", RELEASE_CONFIG).state_dict()
    assert found.keys() == loaded.keys()
    assert [key for key in loaded if not identical(loaded[key], found[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_files_writes_the_layout_of_the_release(layout: str, plain: dict, training: Path, tmp_path: Path) -> None:
    start, release = LAYOUTS[layout](plain), tmp_path / "r.ckpt"
    save_state_dict(start, release)
    merge_files(training, release, tmp_path / "m.ckpt", None, False)
    merged = load_state_dict(tmp_path / "m.ckpt")
    assert list(merged) == list(start)
    changed = [key for key in start if not identical(start[key], merged[key])]
    assert len(changed) == len(moved_keys(start))
    assert all(torch.equal(merged[key], start[key] + 1) for key in changed)
    again = load_release(tmp_path / "m.ckpt", RELEASE_CONFIG).state_dict()
    for key in moved_keys(again):
        assert torch.equal(again[key], plain[key] + 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hack_takes_every_layout(layout: str, plain: dict, training: Path, tmp_path: Path) -> None:
    """Every other layout makes a new training, and the others go into a running one; both open releases alike."""
    release, hacked_path = tmp_path / "r.ckpt", tmp_path / "hacked.ckpt"
    save_state_dict(LAYOUTS[layout](plain), release)
    if list(LAYOUTS).index(layout) % 2:
        hack_config(training_config(release, [RELEASE_CONFIG]), release, hacked_path)
    else:
        hack_training(training, release, hacked_path)
    hacked = load_state_dict(hacked_path)
    assert hacked.keys() == plain.keys()
    assert [key for key in plain if not identical(plain[key], hacked[key])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_open_release_tells_encoders_by_the_digests_of_the_plain_file(layout: str, plain: dict, tmp_path: Path) -> None:
    save_state_dict(LAYOUTS[layout](plain), tmp_path / "r.ckpt")
    assert encoder_digests(open_release(tmp_path / "r.ckpt").weights) == encoder_digests(plain)


def test_open_release_says_what_it_renames_and_what_it_does_not_use(plain: dict, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    save_state_dict(flat_clip(extras(plain)), tmp_path / "r.ckpt")
    open_release(tmp_path / "r.ckpt")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all(line.startswith(f"{tmp_path / 'r.ckpt'}: ") for line in lines)
    assert "keys have other names, such as cond_stage_model.transformer.embeddings" in lines[0]
    for kind in ("embedding_manager", "control_model", "denoiser", "first_stage_model.model_ema", "lora_*"):
        assert kind in lines[1]


def test_load_release_warns_of_another_prediction(plain: dict, tmp_path: Path, caplog) -> None:
    from ldm.config.load import load_config

    save_state_dict(extras(plain), tmp_path / "r.ckpt")
    load_release(tmp_path / "r.ckpt", RELEASE_CONFIG)
    assert "v-prediction" not in caplog.text  # as the config has it
    load_release(tmp_path / "r.ckpt", load_config([RELEASE_CONFIG], ["model.params.parameterization=eps"]))
    assert "holds v_pred, the marker of v-prediction" in caplog.text


def without(plain: dict, *parts: str) -> dict:
    return {key: value for key, value in plain.items() if not key.startswith(parts)}


def other_vae(plain: dict) -> dict:
    return {
        key: value + 0.5 if key.startswith("first_stage_model.") and value.is_floating_point() else value
        for key, value in plain.items()
    }


VAE_FILES: dict[str, Callable] = {
    "in a release": other_vae,
    "alone": lambda plain: {
        **{key.removeprefix("first_stage_model."): value for key, value in other_vae(plain).items() if "first" in key},
        **{"loss.logvar": torch.zeros(1), "model_ema.decay": torch.tensor(0.9)},
    },
    "alone, linear": lambda plain: {
        key.removeprefix("first_stage_model."): value
        for key, value in linear_attention(other_vae(plain)).items()
        if "first" in key
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VAE_FILES)
@pytest.mark.parametrize("has_own", [False, True])
def test_a_vae_of_another_file_is_taken(kind: str, has_own: bool, plain: dict, training: Path, tmp_path: Path) -> None:
    release, vae = tmp_path / "r.safetensors", tmp_path / "vae.safetensors"
    start = flat_clip(plain if has_own else without(plain, "first_stage_model."))
    save_state_dict(start, release)
    save_state_dict(VAE_FILES[kind](plain), vae)
    expected = {key: value for key, value in other_vae(plain).items() if key.startswith("first_stage_model.")}
    model = load_release(release, RELEASE_CONFIG, vae=vae).state_dict()
    merge_files(training, release, tmp_path / "m.safetensors", None, False, vae)
    merged = load_state_dict(tmp_path / "m.safetensors")
    hack_training(training, release, tmp_path / "h.ckpt", vae)
    for found in (model, merged, load_state_dict(tmp_path / "h.ckpt")):
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert merged.keys() == {**start, **expected}.keys()


def test_read_autoencoder_refuses_what_holds_none(plain: dict, tmp_path: Path) -> None:
    save_state_dict(without(plain, "first_stage_model."), tmp_path / "none.ckpt")
    with pytest.raises(UserError, match=r"--vae .*none\.ckpt: holds no autoencoder"):
        read_autoencoder(tmp_path / "none.ckpt")
    diffusers = {"encoder.conv_in.weight": 1, "decoder.conv_out.weight": 1, "encoder.down_blocks.0.resnets.0.x": 1}
    save_state_dict({key: torch.ones(1) for key in diffusers}, tmp_path / "d.safetensors")
    with pytest.raises(
        UserError, match=r"--vae .*d\.safetensors: holds encoder.down_blocks.0.resnets.0.x, which no model"
    ):
        read_autoencoder(tmp_path / "d.safetensors")


def test_a_vae_of_another_kind_is_refused(plain: dict, tiny_release: Path, tmp_path: Path) -> None:
    key = "first_stage_model.decoder.conv_out.weight"
    save_state_dict({**plain, key: torch.ones(3, 8, 3, 3)}, tmp_path / "vae.ckpt")
    with pytest.raises(UserError, match=rf"--vae .*vae\.ckpt: {key} has shape \(3, 8, 3, 3\)"):
        load_release(tiny_release, RELEASE_CONFIG, vae=tmp_path / "vae.ckpt")


def in_channels(plain: dict, count: int) -> dict:
    key = f"{UNET}input_blocks.0.0.weight"
    return {**plain, key: torch.ones(plain[key].shape[0], count, 3, 3)}


def context(plain: dict, width: int) -> dict:
    return {key: torch.ones(len(v), width) if "attn2.to_k" in key else v for key, v in plain.items()}


CAUSES: dict[str, tuple[Callable, str]] = {
    "no autoencoder": (lambda plain: without(plain, "first_stage_model."), "holds no autoencoder: --vae FILE"),
    "no text encoder": (lambda plain: without(plain, "cond_stage_model."), "holds no text encoder"),
    "UNet alone": (lambda plain: without(plain, "first_stage_model.", "cond_stage_model."), "holds a UNet alone"),
    "bare UNet alone": (
        lambda plain: bare_unet(without(plain, "first_stage_model.", "cond_stage_model.")),
        "holds a UNet alone",
    ),
    "no UNet": (lambda plain: without(plain, UNET), "holds no UNet"),
    "inpainting": (lambda plain: in_channels(plain, 9), "takes 9 channels, as an inpainting model does"),
    "edits": (lambda plain: in_channels(plain, 8), "takes 8 channels, as an InstructPix2Pix model does"),
    "SD 2": (
        lambda plain: {**without(plain, "cond_stage_model."), "cond_stage_model.model.ln_final.weight": torch.ones(2)},
        "layout of SD 2",
    ),
    "SDXL": (
        lambda plain: {
            **without(plain, "cond_stage_model."),
            **{"conditioner.embedders.0.x": torch.ones(2), f"{UNET}label_emb.0.0.weight": torch.ones(2, 2)},
        },
        "layout of SDXL",
    ),
    "wide captions": (lambda plain: context(plain, 1024), "captions of width 1024, as SD 2 does"),
    "diffusers": (lambda plain: {"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "layout of diffusers"),
    "LoRA": (lambda plain: {"lora_unet_x.lora_up.weight": torch.ones(1)}, "is a LoRA"),
    "autoencoder": (
        lambda plain: {key[18:]: value for key, value in plain.items() if key.startswith("first_stage_model.")},
        "is an autoencoder alone",
    ),
}


@pytest.mark.parametrize("kind", CAUSES)
def test_likely_cause_is_named(kind: str, plain: dict, training: Path, tmp_path: Path) -> None:
    make, message = CAUSES[kind]
    release = tmp_path / "r.safetensors"
    save_state_dict(make(plain), release)
    with pytest.raises(UserError, match=message) as caught:
        load_release(release, RELEASE_CONFIG)
    assert str(caught.value).startswith(f"{release}: ") and "\n" not in str(caught.value)
    shutil.copy(training, tmp_path / "t.ckpt")
    with pytest.raises(UserError, match=message):
        hack_training(tmp_path / "t.ckpt", release, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
    if "alone" not in kind and "no " not in kind:
        with pytest.raises(UserError, match=message):
            merge_files(training, release, tmp_path / "out.ckpt", None, False)


@pytest.mark.parametrize("layout", [dict, bare_unet])
def test_merge_files_into_a_unet_alone_leaves_out_the_other_parts(
    layout: Callable, plain: dict, training: Path, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO")
    start = layout(without(plain, "first_stage_model.", "cond_stage_model."))
    save_state_dict(start, tmp_path / "unet.safetensors")
    merge_files(training, tmp_path / "unet.safetensors", tmp_path / "m.safetensors", None, False)
    merged = load_state_dict(tmp_path / "m.safetensors")
    assert merged.keys() == start.keys()
    assert len([key for key in start if not torch.equal(start[key], merged[key])]) == 1
    assert "first_stage_model.* of the training skipped" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "loops"), [("1.4.2", {}), ("1.5.0", {"loops": {"fit_loop": {}}}), ("1.9.5", {"loops": {"a": 1}})]
)
def test_training_checkpoints_of_lightning_1_are_taken(
    plain: dict, training: Path, tmp_path: Path, caplog, version: str, loops: dict
) -> None:
    caplog.set_level("INFO")
    content = {**load_checkpoint(training), "global_step": 470000, "pytorch-lightning_version": version}
    old, release = tmp_path / "old.ckpt", tmp_path / "r.ckpt"
    save_checkpoint({key: value for key, value in content.items() if key != "loops"} | loops, old)
    save_state_dict(plain, release)
    merge_files(old, release, tmp_path / "m.ckpt", None, False)
    assert torch.equal(load_state_dict(tmp_path / "m.ckpt")[MOVED], plain[MOVED] + 1)
    hack_training(old, release, tmp_path / "h.ckpt")
    hacked = load_checkpoint(tmp_path / "h.ckpt")
    assert hacked["global_step"] == 0 and "fit_loop" in hacked["loops"]
    assert torch.equal(hacked["state_dict"][MOVED], plain[MOVED])
    said = [record.getMessage() for record in caplog.records if "step counters start at 0" in record.getMessage()]
    line = f"{old}: of Lightning {version}, without the loops of Lightning 2; the step counters start at 0"
    assert said == [line] * 2
    taken_up = read_training_checkpoint(old).content
    assert taken_up["global_step"] == 0 and torch.equal(taken_up["state_dict"][MOVED], plain[MOVED] + 1)
