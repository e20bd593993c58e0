"""Tests of the command `tools/txt2img.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import RELEASE_CONFIG, ROOT

FAST = ("--config", RELEASE_CONFIG, "--steps", 2, "--H", 32, "--W", 32, "--out", "out")


@pytest.fixture
def here(run_tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a function that runs the command in this process and the test's folder: None or the error line."""
    monkeypatch.chdir(tmp_path)
    return partial(run_tool, ROOT / "tools/txt2img.py")


def test_images_settings_and_grid(tiny_release: Path, command: Callable, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n")
    long = " ".join(["red apple"] * 40)
    done = command(
        "tools/txt2img.py",
        "--ckpt",
        tiny_release,
        *FAST,
        "--prompt",
        long,
        "--prompt",
        "a bee",
        "--from-file",
        "prompts.txt",
        "--negative-prompt",
        "blue " * 76,
    )
    assert done.returncode == 0, done.stderr
    assert "2 prompts are longer than 75 tokens and are cut: 'red apple" in done.stdout
    assert "(80 tokens)" in done.stdout and "(76 tokens)" in done.stdout and "Captions of more" not in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "grid-0000.png"]
    with Image.open(tmp_path / "out/00002.png") as image:
        assert image.size == (32, 32)
        settings = json.loads(image.text["parameters"])
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a dog", 42, 2)


def test_nothing_is_overwritten_and_seeds_repeat(tiny_release: Path, here: Callable, tmp_path: Path) -> None:
    for size in (1, 2):
        assert here("--ckpt", tiny_release, *FAST, "--prompt", "red apple", "--n", 2, "--batch-size", size) is None
    first, second, third, fourth = (
        np.asarray(Image.open(tmp_path / f"out/0000{number}.png")).astype(int) for number in range(4)
    )
    assert np.abs(first - third).max() <= 1
    assert np.abs(second - fourth).max() <= 1
    assert np.abs(first - second).max() > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompt"),
        (("--prompt", "x", "--ckpt", "missing.ckpt"), "missing.ckpt"),
        (("--prompt", "x", "--H", 33), "--H 33"),
        (("--prompt", "x", "--n", 0), "--n 0"),
        (("--prompt", "x", "--from-file", "missing.txt"), "missing.txt"),
        (("--prompt", "x", "--config", "finetune_stable_diffusion.yaml"), "another model"),
        (("--prompt", "x", "--device", "cuda:7"), "cuda:7"),
        (("--prompt", "x", "--config", "demo_tiny.yaml"), "reads no captions"),
        (("--prompt", "x", "--scale", "nan"), "--scale nan"),
        (("--prompt", "x", "--eta", 5), "--eta 5"),
        (("--prompt", "x", "--seed", 10**20), "--seed 1000"),
        (("--prompt", "x", "--negative-prompt", "y", "--scale", 1), "--negative-prompt needs guidance"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tiny_release: Path, here: Callable, tmp_path: Path, arguments: tuple, message: str
) -> None:
    line = here("--ckpt", tiny_release, *FAST, *arguments)
    assert line.startswith("error: ") and message in line and "\n" not in line
    assert not (tmp_path / "out").exists()


def test_negative_prompt_changes_the_image_and_is_in_the_metadata(
    tiny_release: Path, here: Callable, tmp_path: Path
) -> None:
    for negative in ((), ("--negative-prompt", "a dog")):
        assert here("--ckpt", tiny_release, *FAST, "--prompt", "red apple", *negative) is None
    images = []
    for number, negative in enumerate(("", "a dog")):
        with Image.open(tmp_path / f"out/0000{number}.png") as image:
            assert json.loads(image.text["parameters"])["negative_prompt"] == negative
            images.append(np.asarray(image).astype(int))
    assert np.abs(images[0] - images[1]).max() > 1
