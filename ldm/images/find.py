"""Images with captions from folders and tars, and a dataset of them for training without pre-encoding."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.files import MOST_IN_MEMBER, read_at_most, read_span
from ldm.images.captions import METADATA, beside, from_metadata
from ldm.images.decode import EXTENSIONS, FORMATS, UNREAD_EXTENSIONS, decode_image
from ldm.util import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageItem:
    """Where an image is, and its caption: None if it has none. `error` says why the caption cannot be read."""

    name: str  # relative to the source
    path: Path
    span: tuple[int, int] | None = None  # offset and size in a tar; None for a whole file
    caption: str | None = None
    error: str | None = None

    def read(self) -> np.ndarray:
        """The image, uint8 `(height, width, 3)`; `UserError` that names it if it or its caption is unreadable."""
        if self.error is not None:
            raise UserError(f"{self.name}: {self.error}")
        try:
            if self.span is None:
                data = read_at_most(self.path, MOST_IN_MEMBER)
            else:
                with self.path.open("rb") as file:
                    data = read_span(file.fileno(), *self.span, self.name)
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror or error}") from error
        return decode_image(bytes(data), self.name)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def extension_of(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def from_file(path: Path, name: str, fixed: str | None) -> ImageItem:
    """An image, whose caption is beside it unless it is `fixed`; of a kind that is not read, one with an error."""
    caption, error = (fixed, None) if fixed is not None else beside(path)
    if extension_of(path) in UNREAD_EXTENSIONS:
        error = f"images of this kind are not read; convert it to one of {', '.join(FORMATS)}"
    return ImageItem(name, path, caption=caption, error=error)


def from_folder(folder: Path, fixed: str | None) -> list[ImageItem]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    images = [path for path in files if extension_of(path) in (*EXTENSIONS, *UNREAD_EXTENSIONS)]
    tars = [path for path in files if path.suffix == ".tar"]
    if images and tars:
        examples = " and ".join(str(paths[0].relative_to(folder)) for paths in (images, tars))
        raise UserError(f"{folder}: holds both images and tars, {examples}; put them into two folders")
    others = {path.suffix or path.name for path in set(files) - set(images)} - {".txt", ".json", ".jsonl", ".tar"}
    if others:
        logger.warning("%s: files of other kinds are left out: %s", folder, ", ".join(sorted(others)))
    if (folder / METADATA).is_file():
        captions = from_metadata(folder)
        unnamed = {path.relative_to(folder).as_posix() for path in images} - {name for name, _ in captions}
        if unnamed:
            logger.warning("%s: %d images, such as %s, are not in %s", folder, len(unnamed), min(unnamed), METADATA)
        named = ((name, caption if fixed is None else fixed) for name, caption in captions)
        return [ImageItem(name, folder / name, caption=caption) for name, caption in named]
    return [from_file(path, path.relative_to(folder).as_posix(), fixed) for path in images]


def digest_images(items: Iterable[ImageItem]) -> str:
    """The SHA-256, in hex, of what can be told of `items` without opening them: names, captions and sizes in bytes."""
    hashed = hashlib.sha256()
    for item in items:
        size = item.span[1] if item.span else (item.path.stat().st_size if item.path.is_file() else None)
        hashed.update(json.dumps([item.name, item.caption, item.error, size]).encode() + b"\n")
    return hashed.hexdigest()
