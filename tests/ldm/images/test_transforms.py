import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images.transforms import centre_crop, fit, fit_square, to_range


@pytest.mark.parametrize(
    ("height", "width", "to", "crop"),
    [
        (4, 4, (8, 8), (0, 0, 4, 4)),
        (4, 9, (8, 8), (0, 2, 4, 4)),
        (9, 4, (8, 8), (2, 0, 4, 4)),
        (1, 7, (8, 8), (0, 3, 1, 1)),
        (100, 100, (64, 128), (25, 0, 50, 100)),
        (100, 300, (64, 128), (0, 50, 100, 200)),
        (100, 151, (128, 192), (0, 0, 100, 150)),  # 0.5 pixels at a side are not seen
        (3, 1, (64, 192), (1, 0, 1, 1)),
    ],
)
def test_the_largest_part_of_those_proportions_is_in_the_middle(height, width, to, crop):
    assert centre_crop(height, width, *to) == crop


@pytest.mark.parametrize(
    ("height", "width", "to"),
    [(96, 96, (32, 32)), (50, 91, (17, 17)), (40, 30, (64, 64)), (33, 33, (33, 33)), (50, 91, (20, 40))],
)
def test_scaling_is_pillows_antialiased_cubic(height, width, to):
    rng = np.random.default_rng(0)
    # Away from 0 and 255, at which Pillow also clips between its two passes.
    image = rng.integers(64, 192, (height, width, 3), dtype=np.uint8)
    top, left, rows, columns = centre_crop(height, width, *to)
    box = (left, top, left + columns, top + rows)
    expected = Image.fromarray(image).crop(box).resize(to[::-1], Image.Resampling.BICUBIC)
    fitted = fit(torch.from_numpy(image), *to)
    assert fitted.shape == (3, *to) and fitted.dtype == torch.uint8
    assert np.abs(fitted.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected, int)).max() <= 1


def test_pixels_go_to_the_range_of_the_autoencoder():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_range(image).tolist() == pytest.approx([-1.0, -0.6, 1.0])
    square = fit_square(image.expand(4, 6, 3), 8)
    assert square.shape == (3, 8, 8) and square.dtype == torch.float32
    torch.testing.assert_close(square[:, 0, 0], to_range(image))


def test_a_fine_chequerboard_becomes_grey_not_aliased():
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = fit_square(torch.from_numpy(np.stack([board] * 3, -1)), 31)
    assert fitted[:, 2:-2, 2:-2].abs().max() < 0.05


def test_a_very_long_image_costs_no_more_than_a_square_one():
    assert fit_square(torch.zeros(1, 60_000, 3, dtype=torch.uint8), 64).shape == (3, 64, 64)
