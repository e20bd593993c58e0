"""Images with captions: where each of them is."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ldm.files import MOST_IN_MEMBER, open_file, read_at_most, read_span
from ldm.identity import Identity, check_identity, retried
from ldm.images.captions import METADATA_FILES, CaptionFiles, from_metadata, metadata_file, read_caption, same_name
from ldm.images.decode import EXTENSIONS, FORMATS, UNREAD_EXTENSIONS, decode_image
from ldm.images.turns import LARGE_FILE, Turn
from ldm.images.walk import walk
from ldm.util import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAMED = 5  # files that a warning names


@dataclass(frozen=True, slots=True)
class ImageItem:
    """Place of an image, and its caption: None if it has none. `error` says why it cannot be read."""

    name: str  # relative to the source
    path: Path
    span: tuple[int, int] | None = None  # offset and size in a tar; None for a whole file
    caption: str | None = None
    error: str | None = None
    identity: Identity | None = None  # of a tar, in which `span` is a place

    def read(self, then: Callable[[np.ndarray], T] = lambda pixels: pixels) -> T:
        """Return `then` of the image, uint8 `(height, width, 3)`, which is to make it smaller.

        Large images are decoded one at a time, whatever the number of processes; `then` is part of that.

        Raises:
            Replaced: the tar is not the one in which the image was found.
            UserError: the image or its caption cannot be read; names it.
        """
        if self.error is not None:
            raise UserError(f"{self.name}: {self.error}")
        with Turn() as turn:
            try:
                if (self.span[1] if self.span else self.path.stat().st_size) > LARGE_FILE:
                    turn.take()
                data = retried(self._data, self.path)
            except OSError as error:
                raise UserError(f"{self.name}: {error.strerror or error}") from error
            return then(decode_image(bytes(data), self.name, turn))

    def _data(self) -> bytes | bytearray:
        if self.span is None:
            return read_at_most(self.path, MOST_IN_MEMBER)
        with open_file(self.path) as file:
            if self.identity is not None:
                check_identity(file.fileno(), self.path, self.identity)
            return read_span(file.fileno(), *self.span, self.name)


def extension_of(path: Path) -> str:
    """Return the extension of `path`, in lower case and without the dot."""
    return path.suffix.lower().lstrip(".")


def is_image(path: Path) -> bool:
    """Return whether `path` has the extension of an image, of a kind that is read or not."""
    return extension_of(path) in (*EXTENSIONS, *UNREAD_EXTENSIONS)


class SingleImages:
    """Items of images that are named one by one, with the captions in their folders."""

    def __init__(self, fixed: str | None) -> None:
        self.fixed = fixed
        self._captions = CaptionFiles()
        self._metadata: dict[Path, dict[str, str | None]] = {}

    def item(self, path: Path, name: str) -> ImageItem:
        """Return the item of an image, whose caption is `fixed`, in the `.txt` beside it, or in the metadata file."""
        caption, error = self.fixed, None
        if self.fixed is None:
            file = self._captions.of(path)
            caption, error = read_caption(file)
            if file is None:
                caption = self._listed(path.parent).get(same_name(path.name))
        return ImageItem(name, path, caption=caption, error=error or kind_error(path))

    def _listed(self, folder: Path) -> dict[str, str | None]:
        if folder not in self._metadata:
            path = metadata_file(folder)
            entries = from_metadata(path) if path else []
            self._metadata[folder] = {same_name(name): caption for name, caption in entries}
        return self._metadata[folder]


def kind_error(path: Path) -> str | None:
    """Return the error of an image of a kind that is not read; None of another."""
    if extension_of(path) not in UNREAD_EXTENSIONS:
        return None
    return f"images of this kind are not read; convert it to one of {', '.join(FORMATS)}"


def from_folder(folder: Path, fixed: str | None) -> list[ImageItem]:
    """Return the images of `folder` and the folders in it; an item with an error for each path that cannot be read.

    A metadata file lists the images of its folder and those below; the others there are left out with a warning.
    Elsewhere a `.txt` beside an image is its caption. `fixed`, if given, is the caption of all.

    Raises:
        UserError: the folder holds both images and tars, or a metadata file cannot be read.
    """
    found = walk(folder)
    images = [path for path in found.files if is_image(path)]
    tars = [path for path in found.files if path.suffix == ".tar"]
    if images and tars:
        examples = " and ".join(str(paths[0].relative_to(folder)) for paths in (images, tars))
        raise UserError(f"{folder}: holds both images and tars, {examples}; put them into two folders")
    listed = [path for path in (*found.files, *found.unreadable) if path.name in METADATA_FILES]
    lists = {parent: metadata_file(parent) for parent in {path.parent for path in listed}}
    captions = CaptionFiles()
    used: set[Path] = set(lists.values())
    items = _from_lists(folder, images, lists, captions, fixed, used)
    for path in images:
        if not any(parent in lists for parent in path.parents):
            file = captions.of(path)
            used |= {file} if file else set()
            caption, error = (fixed, None) if fixed is not None else read_caption(file)
            name = path.relative_to(folder).as_posix()
            items.append(ImageItem(name, path, caption=caption, error=error or kind_error(path)))
    for path, reason in found.unreadable.items():
        if is_image(path) or reason.startswith("the folder"):
            items.append(ImageItem(path.relative_to(folder).as_posix(), path, error=reason))
    _say_left_out(folder, set(found.files) - set(images) - set(tars) - used, images)
    return sorted(items, key=lambda item: folder / item.name) if not _is_one_list(folder, lists) else items


def _is_one_list(folder: Path, lists: dict[Path, Path | None]) -> bool:
    """Return whether one metadata file gives the order of all images."""
    return list(lists) == [folder]


def _from_lists(
    folder: Path,
    images: Sequence[Path],
    lists: dict[Path, Path | None],
    captions: CaptionFiles,
    fixed: str | None,
    used: set[Path],
) -> list[ImageItem]:
    """Return the items of the metadata files in `lists`, by folder; adds the caption files that are read to `used`."""
    items: list[ImageItem] = []
    spelled = {same_name(path.as_posix()): path for path in images}
    for parent in sorted(lists):
        for name, listed in from_metadata(lists[parent]):
            path = parent / name
            if not os.path.lexists(path):  # another spelling of its name, if there is one
                path = spelled.get(same_name(path.as_posix()), path)
            caption, error = listed if fixed is None else fixed, None
            if caption is None:
                file = captions.of(path)
                used |= {file} if file else set()
                caption, error = read_caption(file)
            items.append(ImageItem(path.relative_to(folder).as_posix(), path, caption=caption, error=error))
    named = {item.path for item in items}
    unnamed: dict[Path, list[Path]] = {}
    for path in images:
        parent = next((parent for parent in path.parents if parent in lists), None)
        if parent is not None and path not in named:
            unnamed.setdefault(parent, []).append(path)
    for parent, paths in unnamed.items():
        example, file = paths[0].relative_to(folder), lists[parent].relative_to(folder)
        logger.warning("%s: %d images, such as %s, are not in %s: left out", folder, len(paths), example, file)
    return items


def _say_left_out(folder: Path, others: set[Path], images: Sequence[Path]) -> None:
    """Warn of files that are neither images nor read for their captions."""
    stems = {path.with_suffix("") for path in images}
    beside = {path for path in others if path.suffix.lower() == ".json" and path.with_suffix("") in stems}
    texts = {path for path in others - beside if path.suffix.lower() in (".txt", ".json", ".jsonl", ".csv")}
    kinds = {path.suffix or path.name for path in others - beside - texts}
    if kinds:
        logger.warning("%s: files of other kinds are left out: %s", folder, ", ".join(sorted(kinds)))
    if texts:
        names = sorted(path.relative_to(folder).as_posix() for path in texts)
        shown = ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
        logger.warning("%s: %d files are read for no caption: %s", folder, len(names), shown)


def digest_images(items: Iterable[ImageItem]) -> str:
    """Return the SHA-256, in hex, of names, captions and sizes in bytes of `items`, which are not opened for it."""
    hashed = hashlib.sha256()
    for item in items:
        try:
            size = item.span[1] if item.span else item.path.stat().st_size
        except OSError:
            size = None
        hashed.update(json.dumps([item.name, item.caption, item.error, size]).encode() + b"\n")
    return hashed.hexdigest()
