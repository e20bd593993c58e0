"""Tests of the tools on releases written by other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint, save_state_dict
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.release_layouts import bfloat16_schedule, extras, flat_clip, linear_attention

TXT2IMG, MERGE, HACK = (ROOT / "tools" / f"{name}.py" for name in ("txt2img", "merge_release", "hack_weights"))
CONFIG = ("--config", RELEASE_CONFIG)
TINY = ("--prompt", "a cat", "--steps", 2, "--H", 32, "--W", 32)
MOVED = "model.diffusion_model.out.2.weight"


def foreign(plain: dict) -> dict:
    return bfloat16_schedule(linear_attention(flat_clip(extras(plain))))


@pytest.fixture
def work(tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    plain = load_state_dict(tiny_release)
    save_state_dict(plain, "plain.safetensors")
    save_state_dict(foreign(plain), "foreign.safetensors", metadata={"modelspec.title": "Cats"})
    without = {key: value for key, value in plain.items() if not key.startswith("first_stage_model.")}
    save_state_dict(without, "without.safetensors")
    return tmp_path


def test_txt2img_samples_the_same_image_from_every_layout(work: Path, run_tool: Callable, caplog) -> None:
    caplog.set_level("INFO")
    files = {"plain": (), "foreign": (), "without": ("--vae", "foreign.safetensors")}
    for name, more in files.items():
        assert run_tool(TXT2IMG, "--ckpt", f"{name}.safetensors", *CONFIG, *TINY, "--out", name, *more) is None
    images = [np.asarray(Image.open(work / name / "00000.png")) for name in files]
    assert images[0].std() > 0 and all((image == images[0]).all() for image in images)
    assert "values are not used" in caplog.text and "keys have other names" in caplog.text


def test_txt2img_refuses_a_file_without_an_autoencoder(work: Path, run_tool: Callable) -> None:
    error = run_tool(TXT2IMG, "--ckpt", "without.safetensors", *CONFIG, *TINY)
    assert error.startswith("error: without.safetensors: lacks first_stage_model.") and "--vae FILE" in error
    assert "\n" not in error and not (work / "outputs").exists()


def test_hack_and_merge_release_of_a_run_named_a_b(work: Path, run_tool: Callable) -> None:
    last = work / "logs" / "2026-01-01T00-00-00_a" / "b" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    assert run_tool(HACK, "--base", RELEASE_CONFIG, "--release", "foreign.safetensors", "--out", last) is None
    content = load_checkpoint(last)
    content["state_dict"][MOVED] = content["state_dict"][MOVED] + 1
    save_checkpoint(content, last)
    start = load_state_dict("foreign.safetensors")
    release = last.parent / "foreign.safetensors"
    (work / "foreign.safetensors").rename(release)
    assert run_tool(MERGE, "--release", release, "--out", "m.ckpt") is None
    assert run_tool(MERGE, "--release", "m.ckpt", "--out", "again.safetensors", "--half") is None
    for name in ("m.ckpt", "again.safetensors"):
        merged = load_state_dict(name)
        assert merged.keys() == start.keys()
        assert {key: value.shape for key, value in merged.items()} == {k: v.shape for k, v in start.items()}
        assert torch.equal(merged[MOVED].float(), (start[MOVED] + 1).to(merged[MOVED].dtype).float())
        assert merged["betas"].dtype == torch.bfloat16
    merged = load_state_dict("m.ckpt")
    assert [key for key in start if not torch.equal(start[key], merged[key])] == [MOVED]
    with safe_open("again.safetensors", framework="pt") as file:  # by way of a .ckpt, and with --half
        assert file.metadata()["modelspec.title"] == "Cats"
