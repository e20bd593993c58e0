"""Captions of images, from a text file of the same name."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ldm.files import read_at_most
from ldm.text_files import decode_text
from ldm.util import UserError

CAPTION_SUFFIXES = (".txt", ".caption")  # of the file beside an image. The first existing file is read.
_MOST_IN_CAPTION = 1 << 20  # bytes


def decode_caption(data: bytes | bytearray, several: bool = False) -> tuple[str | None, str | None]:
    """Return caption and error of a caption file. White space is collapsed. An empty file has no caption.

    With `several`, each line that is not empty is a caption, and the result has one per line.
    """
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        return None, f"its caption is not UTF-8: {error}"
    return joined_captions(text.splitlines() if several else [text]), None


def joined_captions(captions: Iterable[str]) -> str | None:
    """Return `captions`, one per line and with white space collapsed, without empty ones; None if there are none."""
    return "\n".join(filter(None, (" ".join(caption.split()) for caption in captions))) or None


def same_name(name: str) -> str:
    """Return the normal form of a file name: composed Unicode and a suffix in lower case.

    Programs on macOS write é as e and an accent. Other programs write one character.
    """
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    return str(path.with_suffix(path.suffix.lower())) if path.suffix else str(path)


def spelled(path: Path) -> Path:
    """Return `path` if it exists, else the file whose name and folders have the same normal form, else `path`."""
    if os.path.lexists(path) or path.parent == path:
        return path
    parent = spelled(path.parent)
    try:
        names = _names_in(parent.absolute(), parent.stat().st_mtime_ns)
    except OSError:
        return path
    return parent / names.get(same_name(path.name), path.name)


@lru_cache(maxsize=64)
def _names_in(folder: Path, _modified: int) -> dict[str, str]:
    """Return the names in `folder` by their normal forms."""
    return {same_name(path.name): path.name for path in sorted(folder.iterdir(), reverse=True)}


class CaptionFiles:
    """Search for the caption file of an image, by the normal form of its name. Each folder is listed once.

    The file is `name.txt` or `name.caption` beside `name.jpg`, else `name.jpg.txt`.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, Path]] = {}

    def of(self, image: Path) -> Path | None:
        """Return the caption file beside `image`, or None."""
        names = [*(image.with_suffix(suffix).name for suffix in CAPTION_SUFFIXES), f"{image.name}.txt"]
        for name in names:
            if os.path.lexists(image.parent / name):
                return image.parent / name
        if image.parent not in self._folders:
            try:
                files = [path for path in image.parent.iterdir() if path.suffix.lower() in CAPTION_SUFFIXES]
            except OSError:
                files = []
            self._folders[image.parent] = {same_name(path.name): path for path in sorted(files, reverse=True)}
        spelled = self._folders[image.parent]
        return next((spelled[same_name(name)] for name in names if same_name(name) in spelled), None)


def read_caption(path: Path | None, several: bool = False) -> tuple[str | None, str | None]:
    """Return caption and error of the caption file at `path`; see `decode_caption`. Both are None if `path` is None."""
    if path is None:
        return None, None
    try:
        return decode_caption(read_at_most(path, _MOST_IN_CAPTION), several)
    except OSError as error:
        return None, f"its caption cannot be read: {error.strerror}"
    except UserError as error:
        return None, str(error)
