"""Tests of the whole recipe through its commands on the demo's tiny model, with both ways to hack."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from benchmarks.fork_server import start_script
from ldm.checkpoint import load_checkpoint, load_state_dict
from ldm.release.load import load_release
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.golden_data import relative_error, seeded_tensor
from tests.waiting import join, wait_for

TRAIN = ("--base", "demo_tiny.yaml", "-t", "--no-test", "--gpus", "0,", "data.params.training_urls=shards/*.tar")
QUIET = ("data.params.batch_size=4", "lightning.callbacks.image_logger.params.disabled=True")


@pytest.fixture
def work(request: pytest.FixtureRequest, tmp_path: Path, tiny_release: Path) -> Callable:
    """Return a function that runs commands in a folder with the release at its default path and shards of the cats.

    The parameter is the name of the fixture that runs a command.
    """
    command = request.getfixturevalue(request.param)

    def call(script: str, *arguments: object) -> str:
        done = command(script, *arguments)
        assert done.returncode == 0, f"{script}: {done.stderr[-2000:]}"
        return done.stdout

    release = tmp_path / "models/ldm/stable-diffusion-v1/model.ckpt"
    release.parent.mkdir(parents=True)
    shutil.copy(tiny_release, release)  # safetensors under the other name: files are told apart by content
    call(
        "tools/preencode.py",
        *("--ckpt", release, "--config", RELEASE_CONFIG, "--images", ROOT / "data/cats"),
        *("--size", 64, "--out", "shards/%06d.tar"),
    )
    return call


def check_merged(release: Path, merged: Path, trained: Path) -> None:
    """Assert that the merged file holds the trained weights and the release's other values, bit for bit."""
    before, after = load_state_dict(release), load_state_dict(merged)
    assert set(load_checkpoint(merged)) <= {"state_dict", "metadata"}
    assert set(before) == set(after)
    training = load_state_dict(trained)
    for key, value in after.items():
        if key.startswith("model.diffusion_model."):
            average = training["model_ema." + key.removeprefix("model.").replace(".", "")]
            assert torch.equal(value, average), key
        else:
            assert torch.equal(value, before[key]), key
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    assert len(moved) > 100


def check_diffusers(merged: Path, folder: Path) -> None:
    """Assert that diffusers opens the merged release and predicts the same noise."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "in_channels": 16,
        "out_channels": 16,
        "block_out_channels": [128, 128],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 48,
    }
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(merged), config=str(folder / "unet"), local_files_only=True
    ).eval()
    ours = load_release(merged, RELEASE_CONFIG)
    x, context, t = seeded_tensor("x", (2, 16, 8, 8)), seeded_tensor("context", (2, 77, 48)), torch.tensor([5, 800])
    with torch.no_grad():
        assert (
            relative_error(ours.apply_model(x, t, context), theirs(x, t, encoder_hidden_states=context).sample) < 1e-5
        )


@pytest.mark.parametrize("work", ["fresh_command"], indirect=True)  # every command once as a user runs it
def test_recipe_from_a_config(work: Callable, tmp_path: Path) -> None:
    release = tmp_path / "models/ldm/stable-diffusion-v1/model.ckpt"
    work("tools/hack_weights.py", "--base", "demo_tiny.yaml", "--out", "start.ckpt")
    work("main.py", "--resume", "start.ckpt", *TRAIN, *QUIET, "--max_steps", 3)
    [trained] = tmp_path.glob("logs/*/checkpoints/last.ckpt")
    assert load_checkpoint(trained)["global_step"] == 3
    work("tools/merge_release.py", "--out", "mine.safetensors")
    check_merged(release, tmp_path / "mine.safetensors", trained)
    check_diffusers(tmp_path / "mine.safetensors", tmp_path)
    sampling = ("--config", RELEASE_CONFIG, "--prompt", "tom the cat", "--steps", 2, "--out", "images")
    work("tools/txt2img.py", "--ckpt", "mine.safetensors", *sampling)
    assert (tmp_path / "images/00000.png").is_file()


@pytest.mark.parametrize("work", ["command"], indirect=True)
def test_recipe_with_an_aborted_run(work: Callable, tmp_path: Path) -> None:
    """Follow the steps of 2022: start, stop with Ctrl-C, hack the checkpoint, resume, merge, with default arguments."""
    log = tmp_path / "aborted.log"
    run = start_script([str(ROOT / "main.py"), *TRAIN, *QUIET, "--max_steps", "100000"], tmp_path, log)
    wait_for(lambda: log.exists() and "loss=" in log.read_text(), run)
    os.kill(run.pid, signal.SIGINT)
    join(run)
    [last] = tmp_path.glob("logs/*/checkpoints/last.ckpt")
    aborted = load_checkpoint(last)["global_step"]
    assert aborted > 0, log.read_text()[-2000:]
    said = work("tools/hack_weights.py")
    assert str(last.relative_to(tmp_path)) in said
    assert last.with_name("last.before-hack.ckpt").is_file()
    folder = last.parents[1].relative_to(tmp_path)
    work("main.py", "--resume", folder, *TRAIN, *QUIET, "--max_steps", aborted + 2)
    assert load_checkpoint(last)["global_step"] == aborted + 2
    work("tools/merge_release.py")
    release = tmp_path / "models/ldm/stable-diffusion-v1/model.ckpt"
    check_merged(release, last.with_name("merged.ckpt"), last)
