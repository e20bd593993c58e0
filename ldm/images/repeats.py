"""Repeats of images by the names of their folders, such as `10_cat`, a convention of other trainers."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from ldm.images.find import ImageItem

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{1,3})_.")


def with_folder_repeats(items: Sequence[ImageItem]) -> list[ImageItem]:
    """Return `items` with the repeats of their folders. Log the folders, if there are any repeats."""
    named = [(item, *_folder_of(item)) for item in items]
    found = Counter((folder, repeats) for _, folder, repeats in named if repeats != 1)
    for (folder, repeats), count in sorted(found.items()):
        logger.info(
            "%s: %d image%s, each %d times per epoch of training, as the name says (--no-repeats: once)",
            folder, count, "s" * (count > 1), repeats,
        )  # fmt: skip
    return [replace(item, repeats=repeats) for item, _, repeats in named] if found else list(items)


def _folder_of(item: ImageItem) -> tuple[str, int]:
    """Return the innermost folder with repeats in its name, and these; ("", 1) if there is none."""
    inside = [*reversed(PurePosixPath(item.name).parent.parts)]
    for folder in inside or ([] if item.span else [item.path.parent.name]):
        match = _NAME.match(folder)
        if match and int(match[1]) > 0:
            return folder, int(match[1])
    return "", 1
