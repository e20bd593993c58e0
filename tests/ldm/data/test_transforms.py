import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.transforms import centre_square, fit_square


@pytest.mark.parametrize(
    ("height", "width", "square"), [(4, 4, (0, 0, 4)), (4, 9, (0, 2, 4)), (9, 4, (2, 0, 4)), (1, 7, (0, 3, 1))]
)
def test_the_square_is_in_the_middle(height, width, square):
    assert centre_square(height, width) == square


@pytest.mark.parametrize(("height", "width", "size"), [(96, 96, 32), (50, 91, 17), (40, 30, 64), (33, 33, 33)])
def test_scaling_is_pillows_antialiased_cubic(height, width, size):
    rng = np.random.default_rng(0)
    # Away from 0 and 255, at which Pillow also clips between its two passes.
    picture = rng.integers(64, 192, (height, width, 3), dtype=np.uint8)
    top, left, side = centre_square(height, width)
    box = (left, top, left + side, top + side)
    expected = Image.fromarray(picture).crop(box).resize((size, size), Image.Resampling.BICUBIC)
    fitted = fit_square(torch.from_numpy(picture), size)
    assert fitted.shape == (3, size, size) and fitted.dtype == torch.float32
    assert fitted.min() >= -1 and fitted.max() <= 1
    ours = ((fitted + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(ours - np.asarray(expected, np.float32)).max() <= 1.01


def test_a_fine_chequerboard_becomes_grey_not_aliased():
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = fit_square(torch.from_numpy(np.stack([board] * 3, -1)), 31)
    assert fitted[:, 2:-2, 2:-2].abs().max() < 0.05


def test_a_very_long_picture_costs_no_more_than_a_square_one():
    assert fit_square(torch.zeros(1, 60_000, 3, dtype=torch.uint8), 64).shape == (3, 64, 64)
