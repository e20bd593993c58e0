"""Masks and depth maps from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images.maps import fit_map, read_depth, read_mask
from ldm.images.transforms import fit
from ldm.util import UserError


def saved(values: np.ndarray, path: Path, mode: str | None = None) -> Path:
    Image.fromarray(values, mode).save(path)
    return path


def test_read_mask_takes_near_white_and_near_black_for_white_and_black(tmp_path: Path) -> None:
    mask = read_mask(saved(np.array([[0, 5, 128, 250, 255]], np.uint8), tmp_path / "m.png"))
    assert mask.dtype == np.float32
    assert mask[0].tolist() == [0, 0, pytest.approx(128 / 255), 1, 1]


def test_read_mask_takes_what_is_transparent_for_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, :, 3] = 255
    assert read_mask(saved(pixels, tmp_path / "m.png")).tolist() == [[0, 0], [1, 1]]


def test_read_mask_refuses_white_on_a_transparent_ground(tmp_path: Path) -> None:
    pixels = np.full((2, 2, 4), 255, np.uint8)
    for opaque in (pixels, np.full((2, 2), 0xFFFF, np.uint16)):  # all is to be repainted
        assert read_mask(saved(opaque, tmp_path / "all.png")).min() == 1
    pixels[0, :, 3] = 0
    with pytest.raises(UserError, match=r"m\.png: transparent pixels count as white, .*; paint black what is kept"):
        read_mask(saved(pixels, tmp_path / "m.png"))


def test_read_mask_refuses_a_black_one(tmp_path: Path) -> None:
    path = saved(np.full((4, 4), 100, np.uint8), tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: no pixel of the mask is white; paint white what is to be repainted"):
        read_mask(path)


def test_read_depth_of_each_kind(tmp_path: Path) -> None:
    """Sixteen bits are kept, which an image for the eye would lose."""
    depth = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "d.npy", depth[None] * 7)
    assert read_depth(tmp_path / "d.npy") == pytest.approx(depth * 7)
    levels = np.array([[1000, 1001], [1002, 1003]], np.uint16)
    assert read_depth(saved(levels, tmp_path / "d.png")) == pytest.approx(levels / 0xFFFF)
    grey = read_depth(saved(np.array([[0, 51], [255, 102]], np.uint8), tmp_path / "e.png"))
    assert grey == pytest.approx(np.array([[0, 0.2], [1, 0.4]]))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4)), "all values of the depth map are 0; give one that varies"),
        (np.array([[0.0, np.nan]]), "the depth map has NaN or infinities"),
        (np.ones((2, 3, 4)), r"has float64 of shape \(2, 3, 4\); a depth map is numbers of shape \(H, W\)"),
        (np.ones(5), r"of shape \(5,\)"),
        (np.ones((0, 4)), r"of shape \(0, 4\)"),
        (np.array([["a", "b"]]), "has <U1 of shape"),
        (np.array([[{}, None]], dtype=object), "not an array that can be read"),
    ],
)
def test_read_depth_refuses_other_arrays(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=rf"d\.npy: .*{message}"):
        read_depth(tmp_path / "d.npy")


def test_read_depth_refuses_a_cut_array(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones((64, 64)))
    (tmp_path / "d.npy").write_bytes((tmp_path / "d.npy").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"d\.npy: not an array that can be read"):
        read_depth(tmp_path / "d.npy")


def test_fit_map_crops_as_fit_does() -> None:
    """A ramp over 60 x 90 pixels keeps its middle; the map and the image agree."""
    ramp = np.tile(np.arange(90, dtype=np.float32), (60, 1))
    image = torch.from_numpy(ramp).to(torch.uint8)[..., None].expand(-1, -1, 3)
    fitted = fit_map(ramp, 30, 30)
    assert fitted.shape == (1, 30, 30)
    assert fitted[0, 0].tolist()[1:-1] == pytest.approx(np.arange(15.5, 75, 2)[1:-1].tolist())
    assert (fit(image, 30, 30)[:1] - fitted).abs().max() <= 1
    assert np.array_equal(fit_map(ramp, 60, 90)[0], ramp)
