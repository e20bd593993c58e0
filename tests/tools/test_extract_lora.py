"""Tests of the command `tools/extract_lora.py`, and of `--lora` of the tools that take its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_checkpoint, save_state_dict
from ldm.release.layer_names import layers_of
from ldm.release.recognition import shapes_of
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.golden_data import seeded_tensor
from tests.ldm.shard_files import write_set

EXTRACT, MERGE, TXT2IMG = (ROOT / "tools" / f"{name}.py" for name in ("extract_lora", "merge_release", "txt2img"))
TINY = ("--config", RELEASE_CONFIG, "--prompt", "a cat", "--steps", 2, "--H", 32, "--W", 32)
PAIR = ("--base", "base.safetensors", "--tuned", "tuned.ckpt")


@pytest.fixture(scope="module")
def releases(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with base.safetensors and tuned.ckpt, whose UNet and text tower differ in all layers."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copy(tiny_release, folder / "base.safetensors")
    plain = load_state_dict(tiny_release)
    save_state_dict({**plain, **moved(plain)}, folder / "tuned.ckpt")
    return folder


def moved(plain: dict[str, Tensor]) -> dict[str, Tensor]:
    keys = {layer.key for layer in layers_of(shapes_of(plain)) if not layer.is_outside}
    return {key: plain[key] + plain[key].std() * seeded_tensor(f"to {key}", tuple(plain[key].shape)) for key in keys}


@pytest.fixture
def work(releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in releases.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_extract_lora_and_merge_release_come_back_to_the_tuned_weights(work: Path, run_tool: Callable, caplog) -> None:
    caplog.set_level("INFO")
    assert run_tool(EXTRACT, *PAIR, "--out", "l.safetensors", "--rank", 5000) is None
    assert "text_encoder" in caplog.text and "energy kept" in caplog.text
    release = ("--release", "base.safetensors", "--lora", "l.safetensors")
    assert run_tool(MERGE, *release, "--out", "again.safetensors") is None
    tuned, again = load_state_dict("tuned.ckpt"), load_state_dict("again.safetensors")
    assert again.keys() == tuned.keys()
    for key, value in tuned.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-5)
    (work / "again.safetensors").unlink()

    # The same image by the tuned release, and by the base with the LoRA while sampling.
    assert run_tool(TXT2IMG, *TINY, "--ckpt", "tuned.ckpt", "--out", "a") is None
    assert run_tool(TXT2IMG, *TINY, "--ckpt", "base.safetensors", "--lora", "l.safetensors:1.0", "--out", "b") is None
    assert run_tool(TXT2IMG, *TINY, "--ckpt", "base.safetensors", "--out", "c") is None
    images = [np.asarray(Image.open(f"{name}/00000.png")).astype(int) for name in "abc"]
    assert np.abs(images[0] - images[1]).max() <= 1 < np.abs(images[0] - images[2]).max()
    with Image.open("b/00000.png") as image:
        assert json.loads(image.text["parameters"])["lora"] == ["l.safetensors:1"]
    (work / "l.safetensors").unlink()


def test_check_prints_the_base_with_the_lora_beside_the_tuned_release(work: Path, run_tool: Callable, caplog) -> None:
    caplog.set_level("INFO")
    shards = write_set(work / "set", 3, f8_shape=(32, 8, 8))
    check = ("--check", shards, "--config", RELEASE_CONFIG, "--device", "cpu")
    assert run_tool(EXTRACT, *PAIR, "--out", "l.safetensors", "--energy", 0.999, *check) is None
    rows = {line.split()[0]: line.split() for line in caplog.messages[-1].splitlines()[1:]}
    base, tuned, lora = (float(rows[name][1]) for name in ("base", "tuned", "LoRA"))
    assert abs(lora - tuned) < 0.5 * abs(base - tuned)
    assert float(rows["LoRA"][-3]) == pytest.approx(float(rows["tuned"][-3]), rel=0.2) and rows["base"][-1] == "0"


def test_merge_release_adds_a_lora_to_a_training(work: Path, run_tool: Callable) -> None:
    plain = load_state_dict("base.safetensors")
    key = "model.diffusion_model.out.2.bias"
    state = {"global_step": 3, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    save_checkpoint({"state_dict": {**plain, key: plain[key] + 1}, **state}, "last.ckpt")
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    shape = plain[conv].shape
    down, up = torch.ones(1, *shape[1:]), torch.ones(shape[0], 1, 1, 1)
    save_state_dict({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, "l.safetensors")
    files = ("--train-ckpt", "last.ckpt", "--release", "base.safetensors", "--out", "m.safetensors")
    assert run_tool(MERGE, *files, "--strength", 0.5, "--lora", "l.safetensors:0.25", "l.safetensors:0.5") is None
    merged = load_state_dict("m.safetensors")
    torch.testing.assert_close(merged[key], plain[key] + 0.5)
    torch.testing.assert_close(merged[conv], plain[conv] + 0.75)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (EXTRACT, (*PAIR, "--out", "l.ckpt"), "l.ckpt: the name must end in .safetensors"),
        (EXTRACT, (*PAIR, "--out", "l.safetensors", "--rank", 0), "--rank 0: give a whole number of at least 1"),
        (EXTRACT, (*PAIR, "--out", "l.safetensors", "--energy", 1.5), "--energy 1.5: give a number"),
        (EXTRACT, (*PAIR[:2], "--tuned", "base.safetensors", "--out", "l.safetensors"), "base.safetensors: has the"),
        (MERGE, ("--lora", "l.safetensors"), "--lora without --train-ckpt: give --out too"),
        (MERGE, ("--lora", "l", "--out", "m.ckpt", "--strength", 0.5), "--strength: needs --train-ckpt"),
        (MERGE, ("--release", "base.safetensors", "--lora", "none:0.5", "--out", "m.ckpt"), "none: no such file"),
        (TXT2IMG, (*TINY, "--ckpt", "base.safetensors", "--lora", "base.safetensors"), "base.safetensors: "),
    ],
)
def test_refusals_are_one_line(work: Path, run_tool: Callable, tool: Path, arguments: tuple, message: str) -> None:
    before = sorted(path.name for path in work.iterdir())
    error = run_tool(tool, *arguments)
    assert error.startswith(f"error: {message}") and "\n" not in error
    assert sorted(path.name for path in work.iterdir()) == before
