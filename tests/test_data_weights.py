"""Runs of main.py with weights of shards, and images of folders with repeats through the real commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    the_run,
)

WEIGHTS = "data.params.training_urls=[{urls: shards/s-000000.tar, weight: 2.5}, shards/s-000001.tar]"
MINIMAL = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"


@pytest.mark.parametrize(
    "options",
    ["", "data.params.prior_urls=shards/s-000001.tar", "-b lean.yaml data.params.batch_size=2", MINIMAL],
    ids=["plain", "prior", "lean", "minimal"],
)
def test_a_resumed_run_with_weights_equals_an_uninterrupted_one(train: Callable, tmp_path: Path, options: str) -> None:
    train([*f"-l straight --max_steps 14 {options}".split(), WEIGHTS])
    train([*f"-l resumed --max_steps 12 {options}".split(), WEIGHTS])  # an epoch has 21 samples, 11 steps
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 14")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    epochs = logged(resumed, "epoch")
    assert (epochs[10], epochs[11]) == ("0", "1")


@pytest.mark.parametrize("flag", [(), ("--no-repeats",)])
def test_images_of_folders_with_repeats_train_as_often(
    run_tool: Callable, tmp_path: Path, tiny_release: Path, flag: tuple[str, ...]
) -> None:
    images, shards = tmp_path / "images", tmp_path / "shards"
    for folder in ("10_cat", "1_dog"):
        (images / folder).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), (100 * number, 0, 0)).save(images / folder / f"{number}.png")
    release = ("--ckpt", tiny_release, "--config", RELEASE_CONFIG, "--images", images, "--out", shards / "%06d.tar")
    options = ("--size", 64, "--shard-size", 3, "--flip", "--num-workers", 0, "--caption", "an image", *flag)
    assert run_tool(ROOT / "tools/preencode.py", *release, *options) is None
    entries = json.loads((shards / "index.json").read_text())["shards"]
    noted = [entry.get("repeats") for entry in entries]  # a shard has one image and its mirror image
    assert noted == ([None] * 4 if flag else [[[10, 2]], [[10, 2]], None, None])
    data = WebDataNpyModuleFromConfig(4, str(shards))
    data.setup("fit")
    assert sum(len(batch["txt"]) for batch in data.train_dataloader()) == (8 if flag else 10 * 4 + 4)
