"""Tests of writing releases to files and to diffusers' folders. tests/oracle/test_diffusers_folders.py opens them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import (
    encoder_digests,
    in_memory,
    load_checkpoint,
    load_state_dict,
    open_checkpoint,
    save_checkpoint,
)
from ldm.checkpoint.formats import same_values
from ldm.checkpoint.keys import COND_STAGE, PREDICTION
from ldm.release.configs import release_config, training_config
from ldm.release.destination import Destination, save_release
from ldm.release.diffusers_config import check_settings
from ldm.release.hack import hack_config
from ldm.release.load import load_release
from ldm.release.lora_merging import add_lora_files
from ldm.release.merge import merge_files
from ldm.release.mixture import Recipe, mix_files
from ldm.release.opening import open_release, read_autoencoder
from ldm.util import UserError
from tests.diffusers_folders import TEXT, UNET, VAE, copied, edit_json, edit_weights, rewrite, write_tiny_folder

KEY = "model.diffusion_model.out.2.weight"
FUSED = f"{COND_STAGE}model.transformer.resblocks.0.attn.in_proj_weight"
PLACE = "text_model.encoder.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of the layout of SD 2, and its config."""
    return write_tiny_folder("sd2_768_v", tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def training(made: tuple[Path, Path]) -> Path:
    """A training from the folder that moved weights of the UNet and of the text tower."""
    folder, config = made
    start = folder.with_name("last.ckpt")
    hack_config(training_config(folder, [config]), folder, start)
    content = load_checkpoint(start)
    for key in (KEY, FUSED):
        content["state_dict"][key] = content["state_dict"][key] + 1
    save_checkpoint(content, start.with_name("trained.ckpt"))
    return start.with_name("trained.ckpt")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of the files as they stand."""
    return {
        f"{name}:{key}": value for name in (UNET, VAE, TEXT) for key, value in load_state_dict(folder / name).items()
    }


def old_names(folder: Path) -> None:
    """Give a folder names of older programs, a constant, and components that no model here has."""
    weights = load_state_dict(folder / VAE)
    rewrite(folder / VAE, {key.replace(".to_q.", ".query."): value for key, value in weights.items()})
    edit_weights(folder / TEXT, text_model__embeddings__position_ids=torch.arange(77)[None])
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"any")
    others = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "..": ["a", "B"], "/": ["a", "B"]}
    edit_json(folder / "model_index.json", **others)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_folder_comes_back_bit_for_bit(made: tuple[Path, Path], is_old: bool, tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "model")
    if is_old:
        old_names(folder)
    release = open_release(folder)
    save_release(release, release.weights, Destination.of(f"{tmp_path}/again/"))
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [key for key in before if not same_values(before[key], after[key])] == []
    before, after = files_of(folder), files_of(tmp_path / "again")
    assert before.keys() == after.keys()
    others = [name for name in before if name not in (UNET, VAE, TEXT) and not name.endswith("/config.json")]
    assert [name for name in others if before[name] != after[name]] == []
    for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json"):
        assert json.loads(before[name]) == json.loads(after[name])


def test_merge_files_writes_what_was_trained(made: tuple[Path, Path], training: Path, tmp_path: Path) -> None:
    merge_files(training, made[0], f"{tmp_path}/merged/", None, half=True)
    before, after = tensors_of(made[0]), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float16}
    changed = [key for key in before if not torch.equal(before[key].half(), after[key])]
    letters = [f"{TEXT}:{PLACE}".replace("k_proj", f"{letter}_proj") for letter in "qkv"]
    assert set(changed) == {f"{UNET}:conv_out.weight", *letters}
    assert torch.equal(after[letters[1]], (before[letters[1]] + 1).half())


def test_files_of_a_folder_have_the_names_of_this_package(
    made: tuple[Path, Path], training: Path, tmp_path: Path
) -> None:
    merge_files(training, made[0], tmp_path / "merged.safetensors", None, False)
    merged, start = load_state_dict(tmp_path / "merged.safetensors"), load_state_dict(made[0])
    assert merged.keys() == start.keys()
    assert torch.equal(merged[FUSED], start[FUSED] + 1)
    # SD 2 base has the same keys, so that only the metadata tells it.
    assert open_checkpoint(tmp_path / "merged.safetensors").metadata["modelspec.prediction_type"] == "v"


def test_mix_files_and_loras_of_folders(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = copied(made[0], tmp_path / "other")
    edit_weights(other / UNET, conv_out__bias=torch.full((4,), 2.0))
    mix_files([made[0], other], f"{tmp_path}/mixed/", Recipe("sum", [0.5]))
    found = load_state_dict(tmp_path / "mixed" / UNET)["conv_out.bias"]
    assert torch.allclose(found, (load_state_dict(made[0] / UNET)["conv_out.bias"] + 2) / 2)
    add_lora_files(made[0], f"{tmp_path}/mixed/", [])
    assert tensors_of(tmp_path / "mixed").keys() == tensors_of(made[0]).keys()


def test_a_file_and_the_folder_of_one_model_mix(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder lacks the last block of the text tower, and what SD 2 does not use."""
    file = made[0].with_suffix(".safetensors")
    mix_files([file, made[0]], tmp_path / "m.safetensors", Recipe("sum", [0.5]))
    assert KEY in load_state_dict(tmp_path / "m.safetensors")
    one, other = (encoder_digests(open_release(path).weights) for path in (file, made[0]))
    assert [name for name in one if one[name] != other[name]] == ["text_tower"]  # not "text_tower_used"


def test_a_new_prediction_changes_the_scheduler(
    made: tuple[Path, Path], training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.release import merge
    from ldm.release.families import FAMILIES

    monkeypatch.setattr(merge, "find_family", lambda *_, **__: FAMILIES["sd2_768_v"])  # small widths are of none
    content = load_checkpoint(training)
    save_checkpoint({**content, PREDICTION: "eps"}, tmp_path / "t.ckpt")
    merge_files(tmp_path / "t.ckpt", made[0], f"{tmp_path}/merged/", None, False)
    scheduler = json.loads((tmp_path / "merged/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon" and scheduler["steps_offset"] == 1
    assert open_release(tmp_path / "merged").predicts == "eps"


def test_the_prediction_of_a_folder_is_that_of_the_config(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "model")
    config = OmegaConf.load(made[1])
    del config.model.params["parameterization"]
    OmegaConf.save(config, tmp_path / "silent.yaml")
    assert release_config(folder, tmp_path / "silent.yaml")[1].model.params.parameterization == "v"
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="epsilon")
    assert release_config(folder, tmp_path / "silent.yaml")[1].model.params.parameterization == "eps"


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("unet", {"attention_head_dim": 8}, "unet/config.json: attention_head_dim is 8, but the model's config has"),
        ("text_encoder", {"num_attention_heads": 3}, "text_encoder/config.json: num_attention_heads is 3, but"),
        ("vae", {"scaling_factor": 0.13025}, "vae/config.json: scaling_factor is 0.13025, but"),
    ],
)
def test_settings_that_no_weight_tells_are_compared(
    made: tuple[Path, Path], name: str, entry: dict, message: str, tmp_path: Path
) -> None:
    folder = copied(made[0], tmp_path / "model")
    edit_json(folder / name / "config.json", **entry)
    with pytest.raises(UserError, match=message):
        load_release(folder, made[1])
    with pytest.raises(UserError, match=message):
        hack_config(training_config(folder, [made[1]]), folder, tmp_path / "start.ckpt")
    assert not (tmp_path / "start.ckpt").exists()


def test_autoencoders_of_diffusers_are_taken(made: tuple[Path, Path]) -> None:
    expected = {key: value for key, value in load_state_dict(made[0]).items() if key.startswith("first_stage_model.")}
    for place in (made[0], made[0] / "vae", made[0] / VAE):
        found = read_autoencoder(place)
        assert found.keys() == expected.keys()
        assert all(torch.equal(in_memory(found[key]), in_memory(expected[key])) for key in expected)


def test_a_model_starts_from_a_folder(made: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """`model.params.ckpt_path`, as for any release."""
    from ldm.config.load import build_model, load_config

    model = build_model(load_config([made[1]], [f"model.params.ckpt_path={made[0]}"]))
    assert torch.equal(model.state_dict()[FUSED], load_state_dict(made[0])[FUSED])
    assert not caplog.records
    eps = "model.params.parameterization=eps"
    build_model(load_config([made[1]], [f"model.params.ckpt_path={made[0]}", eps]))
    assert "its modelspec.prediction_type is v, but the config's parameterization is eps" in caplog.text


def test_an_autoencoder_that_the_folder_has_no_place_for_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "model")
    shutil.rmtree(folder / "vae")
    edit_json(folder / "model_index.json", vae=[None, None])
    with pytest.raises(UserError, match=r"out: the folder has no place for first_stage_model\."):
        add_lora_files(folder, f"{tmp_path}/out/", [], vae=made[0] / "vae")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["model", "notes", "note.txt"])
def test_destinations_that_are_refused(made: tuple[Path, Path], training: Path, out: str, tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("mine")
    (tmp_path / "note.txt").write_text("mine")
    message = {"model": "would replace one of the files", "notes": "has other files", "note.txt": "is not a folder"}
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=message[out]):
        merge_files(training, folder, f"{tmp_path / out}/", None, False)
    assert {name: data for name, data in files_of(tmp_path).items() if not name.startswith(".")} == before


def test_a_training_inside_of_the_folder_is_kept(made: tuple[Path, Path], training: Path, tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "model")
    inside = folder / "last.ckpt"
    inside.hardlink_to(training)
    with pytest.raises(UserError, match="would replace one of the files that are read"):
        merge_files(inside, made[0], f"{folder}/", None, False)


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_of_the_folder_is_kept(made: tuple[Path, Path], is_link: bool, tmp_path: Path) -> None:
    folder = copied(made[0], tmp_path / "model")
    unet = folder / UNET
    if is_link:  # as in the cache of a hub
        unet.rename(tmp_path / "blob")
        unet.symlink_to(tmp_path / "blob")
    before = unet.read_bytes()
    for release in (folder, unet.parent):
        with pytest.raises(UserError, match="would replace one of the files that are read"):
            mix_files([made[0], release], unet, Recipe("sum", [0.5]))
    assert unet.read_bytes() == before and unet.is_symlink() == is_link
    for _ in range(2):  # a file beside the parts is none of them
        mix_files([made[0], folder], folder / "mixed.safetensors", Recipe("sum", [0.5]))


def test_a_folder_of_no_family_needs_a_config(made: tuple[Path, Path], training: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is of no family of full size.*--config"):
        merge_files(training, made[0].with_suffix(".safetensors"), f"{tmp_path}/merged/", None, False)
    assert list(tmp_path.iterdir()) == [] or all(path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_value_that_cannot_be_written_leaves_the_old_folder(
    made: tuple[Path, Path], training: Path, tmp_path: Path
) -> None:
    out = copied(made[0], tmp_path / "out")
    before = files_of(out)
    content = load_checkpoint(training)
    content["state_dict"][KEY] = content["state_dict"][KEY] * float("inf")
    save_checkpoint(content, tmp_path / "diverged.ckpt")
    with pytest.raises(UserError, match="not finite"):
        merge_files(tmp_path / "diverged.ckpt", made[0], f"{out}/", None, False)
    assert files_of(out) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]


ENTRIES = {
    "unet/config.json": ("_class_name", "attention_head_dim", "block_out_channels", "down_block_types", "act_fn",
                         "transformer_layers_per_block", "layers_per_block", "num_attention_heads", "norm_eps"),
    "vae/config.json": ("_class_name", "block_out_channels", "scaling_factor", "up_block_types", "latents_mean"),
    "text_encoder/config.json": ("architectures", "hidden_act", "num_attention_heads", "text_config", "hidden_size"),
    "scheduler/scheduler_config.json": ("_class_name", "prediction_type", "beta_end", "trained_betas",
                                        "rescale_betas_zero_snr"),
    "model_index.json": ("_class_name", "unet", "vae", "transformer", "scheduler"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_any_value_in_a_config_is_taken_or_refused_in_one_line(
    made: tuple[Path, Path], name: str, tmp_path: Path
) -> None:
    folder, config = copied(made[0], tmp_path / "model"), OmegaConf.load(made[1])
    content = json.loads((folder / name).read_text())
    for entry in ENTRIES[name]:
        for value in ("x", [[]], {"x": 1}):
            edit_json(folder / name, **{**content, entry: value})
            try:
                check_settings(open_release(folder).folder, config)
            except UserError as error:
                assert "\n" not in str(error)
