"""Sizes by hand, and the one that an image loses least to."""

import pytest

from ldm.images.buckets import bucket_sizes, nearest_size
from ldm.util import UserError


def test_sizes_by_hand():
    assert bucket_sizes(128) == [(64, 256), (128, 128), (256, 64)]
    assert bucket_sizes(192) == [(128, 256), (192, 192), (256, 128)]  # 64 is less than half
    assert bucket_sizes(64) == [(64, 64)]
    widths = {w: h for h, w in bucket_sizes(512)}
    assert widths[512] == 512 and widths[320] == 768 and widths[384] == 640 and widths[448] == 576
    assert (256, 1024) in bucket_sizes(512) and (1024, 256) in bucket_sizes(512)


@pytest.mark.parametrize("size", [64, 256, 512, 768])
def test_sizes_are_bound(size):
    sizes = bucket_sizes(size)
    assert len(set(sizes)) == len(sizes) and (size, size) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and min(height, width) >= size / 2
        assert height * width <= size * size < (max(height, width) + 64) * min(height, width)


def test_a_size_between_steps_is_refused():
    with pytest.raises(UserError, match="--size 500: with --buckets, give a multiple of 64"):
        bucket_sizes(500)


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [
        (512, 512, (128, 128)),
        (10, 1000, (64, 256)),
        (1000, 10, (256, 64)),
        (100, 190, (128, 128)),
        (100, 210, (64, 256)),
    ],
)
def test_the_nearest_proportions_are_taken(height, width, nearest):
    assert nearest_size(height, width, bucket_sizes(128)) == nearest  # 2 : 1 is between 1 : 1 and 4 : 1
