"""Repeats of images by the names of their folders, such as `10_cat`, a convention of other trainers."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import PurePosixPath

from ldm.images.find import ImageItem

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{1,3})_.")


class FolderRepeats:
    """Repeats of images by their folders, and counts of the images that have them."""

    def __init__(self) -> None:
        self._found: Counter[tuple[str, int]] = Counter()

    def of(self, item: ImageItem) -> ImageItem:
        """Return `item` with the repeats of its folder."""
        folder, repeats = _folder_of(item)
        if repeats != 1:
            self._found[folder, repeats] += 1
        return item if repeats == item.repeats else replace(item, repeats=repeats)

    def log(self) -> None:
        """Log the folders, if there are any repeats."""
        for (folder, repeats), count in sorted(self._found.items()):
            logger.info(
                "%s: %d image%s, each %d times per epoch of training, as the name says (--no-repeats: once)",
                folder, count, "s" * (count > 1), repeats,
            )  # fmt: skip


def _folder_of(item: ImageItem) -> tuple[str, int]:
    """Return the innermost folder with repeats in its name, and these; ("", 1) if there is none."""
    inside = [*reversed(PurePosixPath(item.name).parent.parts)]
    for folder in inside or ([] if item.span else [item.path.parent.name]):
        match = _NAME.match(folder)
        if match and int(match[1]) > 0:
            return folder, int(match[1])
    return "", 1
