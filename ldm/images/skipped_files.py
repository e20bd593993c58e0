"""Warnings of files in a folder of images that are not read."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Collection, Iterable
from pathlib import Path

from ldm.images.decode import is_image

logger = logging.getLogger(__name__)

_NAMED = 5  # files listed in a warning
_TEXTS = (".txt", ".json", ".jsonl", ".csv")


class SkippedFiles:
    """Files of `folder` that are neither images nor caption files in use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kinds: set[str] = set()
        self._texts: list[str] = []  # the first names
        self._count = 0  # of caption files without an image

    def add(self, others: Collection[Path], images: Iterable[Path]) -> None:
        """Add the files `others`, which lie beside `images` or in other folders."""
        described = {path for path in others if path.suffix.lower() == ".json"}
        stems = {path.with_suffix("") for path in images} if described else set()
        beside = {path for path in described if path.with_suffix("") in stems}
        texts = {path for path in others if path not in beside and path.suffix.lower() in _TEXTS}
        self._kinds |= {path.suffix or path.name for path in others if path not in beside and path not in texts}
        self._count += len(texts)
        names = (path.relative_to(self.folder).as_posix() for path in texts)
        self._texts = heapq.nsmallest(_NAMED, [*self._texts, *names])

    def log(self) -> None:
        """Log a warning for the files, if there are any."""
        if self._kinds:
            logger.warning("%s: files of other types skipped: %s", self.folder, ", ".join(sorted(self._kinds)))
        if self._count:
            shown = ", ".join(self._texts) + (" ..." if self._count > _NAMED else "")
            logger.warning("%s: %d caption files without an image: %s", self.folder, self._count, shown)


def is_hidden_input(path: Path) -> bool:
    """Return True if the hidden `path` is a folder or an image, which its owner may miss."""
    return path.is_dir() or (is_image(path) and not path.name.startswith("._"))


def say_hidden(folder: Path, hidden: Iterable[Path], unreadable: Iterable[Path]) -> None:
    """Log a warning for hidden images and folders, and for links that may lead to folders of images."""
    missed = [path for path in hidden if is_hidden_input(path)]
    links = [path for path in unreadable if path.is_symlink() and not path.suffix]
    for paths, what in ((missed, "hidden images and folders skipped"), (links, "links to nothing skipped")):
        if paths:
            names = sorted(path.relative_to(folder).as_posix() for path in paths)
            shown = ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
            logger.warning("%s: %d %s: %s", folder, len(names), what, shown)
