"""Low-resolution versions: each way of scaling against its definition, BSRGAN against what the paper says of it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images.degradations import (
    _FULL,
    _LIGHT,
    NAMES,
    anisotropic_kernel,
    bsrgan,
    degradation,
    isotropic_kernel,
    scale_like_opencv,
)
from ldm.images.sensor import bayer_mask, demosaic, sensor_noise
from ldm.util import UserError
from tests.ldm.image_files import gradient

NOISE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_degradation_makes_every_kind_smaller(name):
    torch.manual_seed(0)
    for factor in (1, 2, 4):
        low = degradation(name, factor)(gradient(32, 48))
        assert low.shape == (32 // factor, 48 // factor, 3) and low.dtype == np.uint8
        assert abs(low.mean() - gradient(32, 48).mean()) < 25
    with pytest.raises(UserError, match="did you mean 'pil_bicubic'"):
        degradation("pil_bicubi", 4)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_pil_degradation_is_pillows(name):
    expected = Image.fromarray(NOISE).resize((12, 8), Image.Resampling[name.upper()])
    assert np.array_equal(degradation(f"pil_{name}", 4)(NOISE), np.asarray(expected))


def test_scale_like_opencv_by_definition():
    """At half the size the new pixels lie in the middle of four old ones."""
    pixels = NOISE.astype(float)
    assert np.array_equal(scale_like_opencv(NOISE, 16, 24, "nearest"), NOISE[::2, ::2])
    four = (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2]) / 4
    for name in ("area", "bilinear"):
        assert np.abs(scale_like_opencv(NOISE, 16, 24, name) - four).max() <= 0.5
    # At a quarter the average is of sixteen pixels, and bilinear still looks at the four in the middle.
    sixteen = pixels.reshape(8, 4, 12, 4, 3).mean((1, 3))
    assert np.abs(scale_like_opencv(NOISE, 8, 12, "area") - sixteen).max() <= 0.5
    assert np.abs(scale_like_opencv(NOISE, 8, 12, "bilinear") - sixteen).mean() > 5


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("bicubic", [-0.09375, 0.59375, 0.59375, -0.09375]),  # Keys' cubic with a = -0.75, halfway
        ("lanczos", [math.sin(math.pi * x) / (math.pi * x) * math.sin(math.pi * x / 4) / (math.pi * x / 4)
                     for x in (-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)]),
    ],
)  # fmt: skip
def test_scale_like_opencv_weights(name, weights):
    weights = np.array(weights) / np.sum(weights)
    line = NOISE[0, :, 0].astype(float)
    image = np.repeat(np.repeat(NOISE[:1], 16, 0)[..., :1], 3, 2)
    found = scale_like_opencv(image, 8, 24, name)[4, :, 0]
    reach = len(weights) // 2
    for column in range(4, 20):
        start = 2 * column + 1 - reach
        expected = np.clip(np.sum(weights * line[start : start + 2 * reach]), 0, 255)
        assert found[column] == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("strength", [_FULL, _LIGHT])
@pytest.mark.parametrize("make", [isotropic_kernel, anisotropic_kernel])
def test_kernels_are_gaussians_that_sum_to_one(make, strength):
    torch.manual_seed(0)
    sizes = set()
    for _ in range(100):
        kernel = make(strength)
        sizes.add(len(kernel))
        assert kernel.shape == (len(kernel), len(kernel)) and len(kernel) % 2
        assert kernel.sum() == pytest.approx(1, abs=1e-5) and kernel.min() >= 0
        assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-6)
        assert kernel.argmax() == kernel.numel() // 2
        if make is isotropic_kernel:
            assert torch.allclose(kernel, kernel.T, atol=1e-6)
    assert sizes == {7, 9, 11, 13, 15, 17, 19, 21}


def test_bsrgan_follows_the_seed_and_the_light_one_is_nearer():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(bsrgan(NOISE, 4))
    assert np.array_equal(*results)
    clean = scale_like_opencv(gradient(64, 64), 16, 16, "area").astype(float)
    distance = {}
    for name in ("bsrgan", "bsrgan_light"):
        torch.manual_seed(0)
        degrade = degradation(name, 4)
        distance[name] = np.mean([np.abs(degrade(gradient(64, 64)) - clean).mean() for _ in range(40)])
    assert 0 < distance["bsrgan_light"] < 0.6 * distance["bsrgan"]


def test_sensor_noise_is_small_and_has_no_bias():
    torch.manual_seed(0)
    grey = torch.full((3, 32, 32), 0.5)
    shots = torch.stack([sensor_noise(grey) for _ in range(50)])
    assert 0.005 < shots.std() < 0.3
    assert abs(shots.mean() - 0.5) < 0.05


def test_demosaic_keeps_what_is_seen_and_fills_a_plane():
    mask = bayer_mask(8, 10)
    assert torch.equal(mask.sum(0), torch.ones(8, 10)) and mask[1].sum() == 40
    plane = torch.tensor([0.2, 0.5, 0.8])[:, None, None].expand(3, 8, 10)
    assert torch.allclose(demosaic(plane * mask, mask), plane)
