"""Copies of images for the page, in one folder: the only files that the page shows. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.files import atomic_write
from ldm.images.find import ImageItem
from ldm.images.logged_png import read_logged_png
from ldm.studio.allowed_folders import AllowedFolders
from ldm.util import UserError, located

SIDE = 384  # longest side of a thumbnail in pixels


class Thumbnails:
    """Folder of copies, each with a name made from the path, size and time of its image, which must be `allowed`."""

    def __init__(self, folder: Path, allowed: AllowedFolders) -> None:
        self.folder, self.allowed = folder.absolute(), allowed

    def of_item(self, item: ImageItem) -> Path:
        """Return a reduced copy of an image of a data set.

        Raises:
            UserError: the image cannot be read.
        """
        path = self._place(item.path, "thumbnail")
        if not path.exists():
            _save(item.read(_reduced), path)
        return path

    def of_png(self, source: Path) -> Path:
        """Return a copy of the PNG file at `source` in full size.

        Raises:
            UserError: it is not a readable PNG.
        """
        path = self._place(source, "png")
        if not path.exists():
            with located(str(source)):
                _save(read_logged_png(source), path)
        return path

    def placeholder(self) -> Path:
        """Return a grey image, for one that cannot be read."""
        path = self.folder / "unreadable.webp"
        if not path.exists():
            _save(Image.new("RGB", (SIDE, SIDE), (128, 128, 128)), path)
        return path

    def _place(self, source: Path, kind: str) -> Path:
        self.allowed.check(source, "image")
        try:
            status = source.stat()
        except OSError as error:
            raise UserError(f"{source}: {error.strerror}") from error
        about = f"{kind} {source.resolve()} {status.st_size} {status.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(about.encode(errors='surrogateescape')).hexdigest()[:32]}.webp"


def _reduced(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def _save(image: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        image.save(temporary, format="WEBP", lossless=True, method=0)
