"""Colours: tensors change as Pillow's images do, and the ranges hold."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images import colours
from ldm.images.colours import ColorJitter, Grayscale, RandomGrayscale
from ldm.images.tensors import PILToTensor, ToTensor
from ldm.util import UserError
from tests.ldm.image_files import gradient

PIL = Image.fromarray(gradient(16, 24))


@pytest.mark.parametrize("change", ["_brightness", "_contrast", "_saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.7])
def test_factors_do_to_tensors_what_they_do_to_pil_images(change, factor):
    function = getattr(colours, change)
    expected = np.asarray(function(PIL, factor)).astype(float)
    for tensor, top in ((PILToTensor()(PIL), 1), (ToTensor()(PIL), 255)):
        changed = function(tensor, factor)
        assert changed.dtype == tensor.dtype
        assert np.abs(changed.permute(1, 2, 0).numpy() * float(top) - expected).max() <= 2.0


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.1, 0.4])
def test_hue_turns_in_hsv(turn):
    tensor = ToTensor()(PIL)
    turned = colours._hue(tensor, turn)
    for row, column in ((0, 0), (3, 20), (15, 5), (8, 8), (15, 23)):
        hue, saturation, value = colorsys.rgb_to_hsv(*tensor[:, row, column].tolist())
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert turned[:, row, column].tolist() == pytest.approx(expected, abs=1e-5)
    # Pillow keeps hues in bytes, which is coarse.
    assert np.abs(np.asarray(colours._hue(PIL, turn)) / 255.0 - turned.permute(1, 2, 0).numpy()).mean() < 0.02


def test_color_jitter_follows_the_seed_and_its_ranges():
    jitter = ColorJitter(0.4, [0.5, 1.5], 0.3, 0.1)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(np.asarray(jitter(PIL)))
    assert np.array_equal(*results) and not np.array_equal(results[0], np.asarray(PIL))
    assert [change[1] for change in jitter.changes] == [
        pytest.approx(pair) for pair in ((0.6, 1.4), (0.5, 1.5), (0.7, 1.3), (-0.1, 0.1))
    ]
    assert np.array_equal(np.asarray(ColorJitter()(PIL)), np.asarray(PIL))


@pytest.mark.parametrize("given", [{"hue": 0.6}, {"brightness": -0.1}, {"contrast": [2, 1]}, {"hue": [-0.7, 0]}])
def test_color_jitter_refuses_other_ranges(given):
    with pytest.raises(UserError, match=next(iter(given))):
        ColorJitter(**given)


def test_grayscale():
    expected = np.asarray(PIL.convert("L")).astype(int)
    assert np.array_equal(np.asarray(Grayscale()(PIL)), expected)
    three = Grayscale(3)(PILToTensor()(PIL))
    assert three.shape == (3, 16, 24)
    assert np.abs(three[0].numpy().astype(int) - expected).max() <= 1
    assert RandomGrayscale(1.0)(PIL).mode == "RGB" and RandomGrayscale(0.0)(PIL) is PIL
    with pytest.raises(UserError, match="num_output_channels 2"):
        Grayscale(2)
