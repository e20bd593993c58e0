"""Variants of captions that are lists of tags: in other orders, and without some tags."""

from __future__ import annotations

import random
from dataclasses import replace

from ldm.images.find import ImageItem


def with_tag_variants(item: ImageItem, count: int, keep: int = 0, dropout: float = 0.0) -> ImageItem:
    """Return `item` with up to `count` captions, one per line: the caption itself, and variants of its tags.

    Tags are separated by commas. A variant has the first `keep` tags in their places, and the others in random order,
    each left out with the probability `dropout`. Variants depend on the name of the image alone. Equal ones are stored
    once, so that a caption without commas has none.
    """
    return replace(item, caption=item.caption and _variants(item, count, keep, dropout))


def _variants(item: ImageItem, count: int, keep: int, dropout: float) -> str:
    tags = [tag for tag in map(str.strip, (item.caption or "").split(",")) if tag]
    captions = [item.caption]
    for number in range(1, count):
        stream = random.Random(f"{item.name}/{number}")
        rest = [tag for tag in tags[keep:] if stream.random() >= dropout]
        stream.shuffle(rest)
        captions.append(", ".join([*tags[:keep], *rest]) if len(tags) > 1 else item.caption)
    return "\n".join(dict.fromkeys(filter(None, captions)))
