"""The tools take folders in the layout of diffusers, and write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import load_checkpoint, load_state_dict, save_checkpoint
from tests.conftest import ROOT
from tests.diffusers_folders import UNET, write_tiny_folder

TXT2IMG, MERGE, HACK, MIX, EXTRACT, PREENCODE = (
    ROOT / "tools" / f"{name}.py"
    for name in ("txt2img", "merge_release", "hack_weights", "merge_models", "extract_lora", "preencode")
)
KEY = "model.diffusion_model.out.2.weight"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny_folder("sd1", tmp_path)
    return tmp_path


def test_the_whole_way_through_folders(work: Path, run_tool: Callable, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run_tool(HACK, "--base", "sd1.yaml", "--release", "sd1/") is None
    content = load_checkpoint("hacked.ckpt")
    assert content["release"]["name"] == "sd1" and len(content["release"]["sha256"]) == 64
    content["state_dict"][KEY] = content["state_dict"][KEY] + 0.1
    save_checkpoint(content, "trained.ckpt")
    assert run_tool(MERGE, "--train-ckpt", "trained.ckpt", "--release", "sd1", "--out", "tuned/") is None
    start = load_state_dict(Path("sd1") / UNET)["conv_out.weight"]
    assert torch.equal(load_state_dict(Path("tuned") / UNET)["conv_out.weight"], start + 0.1)
    # A second time, the folder is replaced.
    assert run_tool(MERGE, "--train-ckpt", "trained.ckpt", "--release", "sd1", "--out", "tuned") is None
    assert run_tool(MIX, "sd1", "tuned", "--out", "mixed/") is None
    assert torch.allclose(load_state_dict(Path("mixed") / UNET)["conv_out.weight"], start + 0.05)
    said = run_tool(MIX, "sd1", "tuned", "--out", "mixed.ckpt", "--config", "sd1.yaml")
    assert said == "error: --config sd1.yaml: is for a folder of diffusers, and mixed.ckpt is a file; leave it out"
    options = "--rank", 4, "--all-layers", "--out", "lora.safetensors"
    assert run_tool(EXTRACT, "--base", "sd1", "--tuned", "tuned", *options) is None
    assert {key.partition(".")[0] for key in load_state_dict("lora.safetensors")} == {"lora_unet_conv_out"}


def test_txt2img_and_preencode_of_a_folder_and_its_file(work: Path, run_tool: Callable) -> None:
    tiny = ("--config", "sd1.yaml", "--prompt", "a cat", "--steps", 2, "--H", 32, "--W", 32)
    for release in ("sd1", "sd1.safetensors"):
        assert run_tool(TXT2IMG, "--ckpt", release, *tiny, "--out", f"of-{release}") is None
    one, other = (np.asarray(Image.open(f"of-{name}/00000.png")) for name in ("sd1", "sd1.safetensors"))
    assert one.std() > 0 and (one == other).all()
    options = "--config", "sd1.yaml", "--images", "of-sd1", "--size", 64, "--caption", "a cat", "--num-workers", 0
    assert run_tool(PREENCODE, "--ckpt", "sd1", *options, "--out", "shards/%06d.tar") is None
    assert list(Path("shards").glob("*.tar"))


@pytest.mark.parametrize("tool", [TXT2IMG, HACK, MERGE, MIX])
def test_a_damaged_folder_gives_one_line(tool: Path, work: Path, run_tool: Callable) -> None:
    (work / UNET.replace("unet", "sd1/unet")).unlink()
    arguments = {
        TXT2IMG: ("--ckpt", "sd1", "--config", "sd1.yaml", "--prompt", "x"),
        HACK: ("--release", "sd1", "--base", "sd1.yaml"),
        MERGE: ("--release", "sd1", "--lora", "none.safetensors", "--out", "out/"),
        MIX: ("sd1", "sd1.safetensors", "--out", "out/"),
    }
    error = run_tool(tool, *arguments[tool])
    assert error.startswith("error: sd1/unet: holds no weights of diffusers") and "\n" not in error
    assert not (work / "out").exists() and not (work / "hacked.ckpt").exists()
