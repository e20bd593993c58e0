"""Pairs of images before and after an edit, by the names of their files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ldm.images.captions import same_name
from ldm.images.find import EDITED, ImageItem, is_edited

logger = logging.getLogger(__name__)

NAMED = 5  # images listed in a warning


def pair_up(items: Sequence[ImageItem]) -> list[ImageItem]:
    """Return the images before an edit. Each has its `edited` image: the one that it has already, or the one beside it.

    An image without an edited image gets an error. A warning names the edited images without an original.
    """
    edited = {(item.path.parent, name_of_original(item.path)): item for item in items if _is_alone(item)}
    found = []
    for item in items:
        if _is_alone(item):
            continue
        other = item.edited or edited.pop((item.path.parent, same_name(item.path.stem)), None)
        found.append(pair_of(item, other))
    warn_of_edited([item.name for item in edited.values()], len(edited))
    return found


def name_of_original(edited: Path) -> str:
    """Return the name without extension, in its normal form, of the image that `edited` is an edit of."""
    return same_name(edited.stem[: -len(EDITED)])


def pair_of(item: ImageItem, other: ImageItem | None) -> ImageItem:
    """Return `item` with its edited image `other`, or with an error if there is none."""
    name = PurePosixPath(item.name)
    error = f"has no edited image such as {name.stem}{EDITED}{name.suffix} beside it" if other is None else None
    return replace(item, edited=other, error=item.error or (other.error if other else error))


def warn_of_edited(names: Sequence[str], count: int) -> None:
    """Log a warning of `count` edited images without an original, the first of which have `names`."""
    if count:
        shown = ", ".join(names[:NAMED]) + (" ..." if count > NAMED else "")
        logger.warning("%d edited images skipped, because no original is beside them: %s", count, shown)


def _is_alone(item: ImageItem) -> bool:
    """Return True for the second image of a pair, before it is joined to the first."""
    return item.edited is None and item.span is None and is_edited(item.path)
