"""Sizes of about one area and many proportions, so that an image is cropped little: aspect-ratio buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ldm.util import UserError

STEP = 64  # pixels; sides are multiples of it

Size = tuple[int, int]  # height and width, in pixels


def bucket_sizes(size: int) -> list[Size]:
    """Every size with sides in multiples of 64, at least half of `size`, and an area of at most `size`²; sorted.

    Of each width, only the tallest; and its mirror image. So 512 gives 256×1024, 320×768, … 512×512, … 1024×256.

    Raises:
        UserError: `size` is no multiple of 64.
    """
    if size % STEP:
        raise UserError(f"--size {size}: with --buckets, give a multiple of {STEP}")
    least = -(-size // (2 * STEP)) * STEP
    found = set()
    for width in range(least, size + 1, STEP):
        height = size * size // width // STEP * STEP
        found |= {(height, width), (width, height)}
    return sorted(found)


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` whose proportions are nearest to height : width, by their ratio; of equals, the first.

    An image scaled to cover it loses the least share of its area at the borders.
    """
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))
