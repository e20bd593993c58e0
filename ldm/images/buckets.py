"""Aspect-ratio buckets: sizes of similar area and different aspect ratios, so that little of an image is cropped."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ldm.util import refuse_if

STEP = 64  # divisor of all sides, in pixels

Size = tuple[int, int]  # height and width, in pixels


def bucket_sizes(size: int) -> list[Size]:
    """Return the bucket sizes with an area of at most `size`², sorted. Sides are multiples of 64 from `size` / 2.

    Each width has its largest height, and each size is also included with its sides exchanged. For 512, the sizes are
    256×1024, 320×768, … 512×512, … 1024×256.

    Raises:
        UserError: `size` is not a multiple of 64.
    """
    refuse_if(size % STEP, f"--size {size}: with --buckets, give a multiple of {STEP}")
    least = -(-size // (2 * STEP)) * STEP
    found = set()
    for width in range(least, size + 1, STEP):
        height = size * size // width // STEP * STEP
        found |= {(height, width), (width, height)}
    return sorted(found)


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """Return the first of `sizes` with the aspect ratio nearest to height : width, by the quotient of the ratios.

    With this size, the centre crop removes the smallest share of the image.
    """
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))
