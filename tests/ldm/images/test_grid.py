"""Images from tensors: range, rounding, grid layout, PNG metadata."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images.grid import image_distances, image_grid, save_png, to_images, to_uint8


def test_the_ends_of_the_range_are_black_and_white_and_the_rest_is_clamped():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0, float("nan")]).reshape(6, 1, 1, 1)
    assert to_uint8(values)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 0]


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [(1, None, (8, 7)), (5, 5, (32, 7)), (5, 2, (14, 17)), (4, None, (14, 12)), (2, 9, (14, 7))],
)
def test_grid_size(count, columns, size):
    assert image_grid(torch.zeros(count, 3, 3, 4), columns).size == size


def test_grid_keeps_row_order():
    batch = torch.linspace(-1, 1, 4).reshape(4, 1, 1, 1)
    pixels = np.asarray(image_grid(batch, 2))[2::3, 2::3, 0]
    assert pixels.tolist() == [[0, 85], [170, 255]]


def test_png_round_trip_with_metadata(tmp_path):
    image = to_images(torch.rand(1, 3, 5, 6) * 2 - 1)[0]
    save_png(image, tmp_path / "new" / "a.png", {"prompt": "ein Bär"})
    with Image.open(tmp_path / "new" / "a.png") as loaded:
        assert loaded.text == {"prompt": "ein Bär"}
        assert np.array_equal(np.asarray(loaded), np.asarray(image))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_distances_by_hand():
    """Black and white are 1 apart; half of the pixels 0.5 apart make a root mean square of 0.5 / √2."""
    black, half = torch.full((3, 64, 64), -1.0), torch.full((3, 64, 64), -1.0)
    half[:, :32] = 0.0
    white = torch.full((3, 64, 64), 5.0)  # clamped
    found = image_distances(torch.stack([black, half]), torch.stack([black, white, half]))
    expected = [[0.0, 1.0, 0.5 / 2**0.5], [0.5 / 2**0.5, (0.5 * (1 + 0.25)) ** 0.5, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[0, 0] == found[1, 2] == 0, "exactly"


def test_distances_are_those_of_images_averaged_down_to_one_size():
    fine = torch.ones(1, 3, 64, 64)
    fine[..., ::2] = -1.0  # stripes that averaging turns to grey
    assert image_distances(fine, torch.zeros(1, 3, 128, 96)) == 0
    assert image_distances(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 64, 64)) == 0
