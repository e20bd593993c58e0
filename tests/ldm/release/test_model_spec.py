"""Tests of the metadata of written files: the public ModelSpec, and nothing private."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint, save_state_dict
from ldm.checkpoint.keys import UNET
from ldm.release import destination
from ldm.release.families import FAMILIES
from ldm.release.merge import merge_files
from ldm.release.mixture import Recipe, mix_files
from ldm.release.model_spec import SETTINGS, architecture, described, training_settings
from ldm.util import UserError

KEY = f"{UNET}out.2.weight"
TRAINING = {
    "state_dict": {KEY: torch.full((2,), 3.0)},
    "global_step": 7,
    "epoch": 2,
    "loops": {},
    "pytorch-lightning_version": "2.5.0",
    "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999), "params": [0]}]}],
    "lr_schedulers": [],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a person's name with a release, a second one and a run, which are taken for SD 1."""
    folder = tmp_path / "home" / "jane_doe"
    folder.mkdir(parents=True)
    monkeypatch.setattr(destination, "find_family", lambda *_, **__: FAMILIES["sd1"])
    save_state_dict({KEY: torch.ones(2)}, folder / "base.safetensors", metadata={"modelspec.author": "Public Author"})
    save_state_dict({KEY: torch.full((2,), 2.0)}, folder / "other, one.safetensors")
    run = folder / "logs" / "run"
    (run / "configs").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    save_checkpoint(TRAINING, run / "checkpoints" / "last.ckpt")
    project = {
        "model": {"base_learning_rate": 1e-6, "target": "x.Y", "params": {"ckpt_path": str(folder), "use_ema": False}},
        "data": {"target": "x.Z", "params": {"batch_size": 4, "training_urls": f"{folder}/cats.tar"}},
    }
    (run / "configs" / "2026-project.yaml").write_text(json.dumps(project))
    trainer = {"lightning": {"trainer": {"precision": "bf16", "max_steps": 100, "default_root_dir": str(folder)}}}
    (run / "configs" / "2026-lightning.yaml").write_text(json.dumps(trainer))
    return folder


@pytest.mark.parametrize("seconds", ["9" * 30, "yesterday", "1.5"])
def test_a_date_that_is_none_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)
    training = folder / "logs/run/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=f"SOURCE_DATE_EPOCH={seconds} in the environment: give seconds since 1970$"):
        merge_files(training, folder / "base.safetensors", folder / "cats.safetensors", None, False)
    assert not (folder / "cats.safetensors").exists()


def test_merged_files_follow_the_specification(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1690000000")
    training = folder / "logs/run/checkpoints/last.ckpt"
    merge_files(training, folder / "base.safetensors", folder / "cats.safetensors", None, False)
    metadata = open_checkpoint(folder / "cats.safetensors").metadata
    data = (folder / "cats.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": "cats",
        "modelspec.author": "Public Author",
        "modelspec.date": "2023-07-22T04:26:40Z",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(data[start:]).hexdigest()}",
    }


def test_embedded_settings_name_no_path_no_person_and_no_value_of_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    noted = {"model": {"params": {"loss_type": "${oc.env:SECRET}"}}}
    (folder / "logs/run/configs/2027-project.yaml").write_text(json.dumps(noted))
    training, options = folder / "logs/run/checkpoints/last.ckpt", {"embed_settings": True}
    for out in ("cats.safetensors", "cats.ckpt"):
        merge_files(training, folder / "base.safetensors", folder / out, None, False, **options)
        metadata = open_checkpoint(folder / out).metadata
        assert json.loads(metadata[SETTINGS]) == {
            "global_step": 7,
            "epoch": 2,
            "optimizer_0.lr": 1e-5,
            "optimizer_0.betas": [0.9, 0.999],
            "model.base_learning_rate": 1e-6,
            "model.params.use_ema": False,
            "data.params.batch_size": 4,
            "lightning.trainer.precision": "bf16",
            "lightning.trainer.max_steps": 100,
        }
        assert not re.search("jane|doe|home|cats.tar|hunter2|oc.env", str(metadata))
    assert "modelspec.date" not in metadata  # a .ckpt keeps what the release tells, and no more


def test_training_settings_outside_of_a_run(folder: Path) -> None:
    assert set(training_settings(load_checkpoint(folder / "logs/run/checkpoints/last.ckpt"), None)) == {
        "global_step", "epoch", "optimizer_0.lr", "optimizer_0.betas",
    }  # fmt: skip


def test_mixtures_name_what_they_were_made_of(folder: Path) -> None:
    paths = [folder / "base.safetensors", folder / "other, one.safetensors"]
    mix_files(paths, folder / "mixed.safetensors", Recipe("sum", [0.5]))
    metadata = open_checkpoint(folder / "mixed.safetensors").metadata
    assert metadata["modelspec.merged_from"] == "base, other  one"
    assert "jane" not in str(metadata)


def test_described_without_a_family_does_not_claim_to_follow_the_specification() -> None:
    found = described({"modelspec.hash_sha256": "0x1", "x": "y"}, Path("a/b.safetensors"), [KEY], None)
    assert set(found) == {"x", "modelspec.title", "modelspec.date", "modelspec.hash_sha256"}
    assert found["modelspec.title"] == "b" and found["modelspec.hash_sha256"] == ""


def test_architecture_tells_every_family_from_the_others() -> None:
    names = {architecture(family, family.parameterization) for family in FAMILIES.values()}
    assert len(names) == len(FAMILIES)
    assert architecture(FAMILIES["sd2_768_v"], "eps") == "stable-diffusion-v2-512"


def test_described_leaves_out_what_other_trainers_and_uis_tell_of_a_person() -> None:
    private = {
        "ss_dataset_dirs": '{"/home/jane/cats": {"n_repeats": 10}}',
        "ss_tag_frequency": '{"cats": {"jane\'s cat": 3}}',
        "ss_sd_model_name": "C:\\\\Users\\\\jane\\\\model.ckpt",
        "ss_optimizer_args": "state=/home/jane/state.pt",
        "note": "made from D:/jane/cats and others",
        "recipe": '["C:\\\\jane\\\\a.ckpt"]',
        "ot_config": '{"workspace_dir": "/home/jane"}',
        "workflow": "{}",
        "prompt": '{"6": {"inputs": {"text": "jane\'s cat"}}}',
    }
    kept = {"ss_steps": "3", "modelspec.title": "Cats", "modelspec.thumbnail": "data:image/jpeg;base64,/9j/data/home/"}
    kept["modelspec.description"] = "trained on cats at 512/768, see https://example.com/home/data/"
    found = described({**private, **kept}, Path("b.safetensors"), [KEY], None)
    assert "jane" not in str(found) and kept.items() <= found.items() and not private.keys() & found.keys()
