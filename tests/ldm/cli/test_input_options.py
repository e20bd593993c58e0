"""Options for the inputs of sampling besides prompts."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.input_options import InputFiles, add_input_options, check_input_options, read_inputs
from ldm.util import UserError


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_input_options(parser)
    options = parser.parse_args([str(argument) for argument in arguments])
    check_input_options(options)
    return options


def read(*arguments: object) -> InputFiles:
    return read_inputs(parsed(*arguments))


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Pixels of `image.png`, beside `mask.png`, which is white in one pixel of 32 x 48."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save("image.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[3, 20] = 255
    Image.fromarray(mask).save("mask.png")
    return pixels


def test_an_image_of_the_right_size_stays_as_it_is(image: np.ndarray) -> None:
    files = read("--image", "image.png", "--mask", "mask.png", "--init-image", "image.png")
    inputs = files.fitted(32, 48)
    assert torch.equal(((inputs.image + 1) * 127.5).round(), torch.from_numpy(image).permute(2, 0, 1).float())
    assert torch.equal(inputs.init, inputs.image)
    assert inputs.mask.nonzero().tolist() == [[0, 3, 20]]
    assert inputs.strength == 0.75 and inputs.depth is None and inputs.sizes == {}
    named = {"init_image": "image.png", "image": "image.png", "mask": "mask.png", "strength": 0.75}
    assert files.settings() == named


def test_without_an_image_to_start_from_all_steps_run(image: np.ndarray) -> None:
    files = read("--crop", 3, 4)
    assert files.settings() == {} and files.fitted(32, 32).strength == 1.0
    assert files.fitted(32, 32).sizes == {"crop_top_left": [3, 4]}


def test_a_mask_must_survive_scaling(image: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match=r"--mask mask\.png: nothing of it is left at 8x8 pixels; paint a larger part"):
        read("--image", "image.png", "--mask", "mask.png").fitted(8, 8)
    assert "image.png: 48x32 pixels, cropped and scaled to 8x8" in caplog.text


def test_depth_may_differ_in_size_but_not_in_proportions(image: np.ndarray) -> None:
    np.save("depth.npy", np.arange(65.0 * 96).reshape(65, 96))
    assert read("--depth", "depth.npy", "--init-image", "image.png").fitted(32, 32).depth.shape == (1, 32, 32)
    np.save("square.npy", np.arange(64.0).reshape(8, 8))
    with pytest.raises(UserError, match=r"--depth square\.npy: has 8x8 values, and its image 48x32 pixels"):
        read("--depth", "square.npy", "--image", "image.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strength", 0.5), r"--strength 0\.5: give --init-image too"),
        (("--init-image", "image.png", "--strength", 1.01), r"--strength 1\.01: give a number above 0, up to 1"),
        (("--init-image", "image.png", "--strength", "nan"), "--strength nan: give a number above 0"),
        (("--mask", "mask.png"), r"--mask mask\.png: give --image too"),
        (("--image-scale", "inf"), "--image-scale inf: give a finite number"),
        (("--target-size", 64, 0), "--target-size 0: give a whole number of at least 1"),
    ],
)
def test_options_out_of_range_or_without_another(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*arguments)
