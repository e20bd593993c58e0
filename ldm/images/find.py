"""Search for images and their captions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ldm.files import MOST_IN_MEMBER, open_file, read_at_most, read_span
from ldm.identity import Identity, check_identity, retried
from ldm.images.captions import CaptionFiles, read_caption, same_name
from ldm.images.decode import FORMATS, UNREAD_EXTENSIONS, decode_image, extension_of, is_image
from ldm.images.decode_lock import LARGE_FILE, DecodeLock
from ldm.images.metadata import METADATA_FILES, Entry, from_metadata, metadata_file
from ldm.images.skipped_files import SkippedFiles, say_hidden
from ldm.images.walk import walk
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

T = TypeVar("T")

EDITED = ".edited"  # end of the stem of an edited image
MASK_ENDING = ".mask"  # end of the stem of a loss mask


@dataclass(frozen=True, slots=True)
class ImageItem:
    """Location of an image, and its caption or None. `error` is the reason if it cannot be read.

    In a pair, this is the image before the edit that the caption describes, and `edited` is the image after the edit.
    `mask` is the image of a loss mask.
    """

    name: str  # path relative to the source
    path: Path
    span: tuple[int, int] | None = None  # offset and size in a tar; None for a file
    caption: str | None = None  # several captions have one per line
    error: str | None = None
    edited: ImageItem | None = None
    identity: Identity | None = None  # of the tar that `span` is a place in
    repeats: int = 1  # number of times that an epoch of training has the image
    mask: ImageItem | None = None

    def read(
        self,
        then: Callable[[np.ndarray], T] = lambda pixels: pixels,
        decode: Callable[[bytes, str, DecodeLock], Any] = decode_image,
    ) -> T:
        """Decode the image, by default to uint8 (height, width, 3), and return `then(image)`, usually a smaller image.

        Only one process at a time decodes a large image and runs `then` on it.

        Raises:
            Replaced: the tar was replaced after the image was found in it.
            UserError: the image or its caption cannot be read. The message names the image.
        """
        refuse_if(self.error is not None, f"{self.name}: {self.error}")
        with DecodeLock() as lock:
            try:
                if (self.span[1] if self.span else self.path.stat().st_size) > LARGE_FILE:
                    lock.take()
                data = retried(self._data, self.path)
            except OSError as error:
                raise UserError(f"{self.name}: {error.strerror or error}") from error
            return then(decode(bytes(data), self.name, lock))

    def _data(self) -> bytes | bytearray:
        if self.span is None:
            return read_at_most(self.path, MOST_IN_MEMBER)
        with open_file(self.path) as file:
            if self.identity is not None:
                check_identity(file.fileno(), self.path, self.identity)
            return read_span(file.fileno(), *self.span, self.name)


class SingleImages:
    """Items of single images, with the captions in their folders."""

    def __init__(self, fixed: str | None, several: bool = False) -> None:
        self.fixed, self.several = fixed, several
        self._captions = CaptionFiles()
        self._metadata: dict[Path, dict[str, str | None]] = {}

    def item(self, path: Path, name: str) -> ImageItem:
        """Return the item of an image. Its caption is `fixed`, else in the metadata, else in the file beside it."""
        caption, error = self.fixed, None
        if caption is None:
            caption = self._listed(path.parent).get(same_name(path.name))
        if caption is None:
            caption, error = read_caption(self._captions.of(path), self.several)
        return ImageItem(name, path, caption=caption, error=error or kind_error(path))

    def _listed(self, folder: Path) -> dict[str, str | None]:
        if folder not in self._metadata:
            path = metadata_file(folder)
            entries = from_metadata(path, several=self.several) if path else []
            self._metadata[folder] = {same_name(entry.name): entry.caption for entry in entries}
        return self._metadata[folder]


def kind_error(path: Path) -> str | None:
    """Return the error of an unsupported image, or None."""
    if extension_of(path) not in UNREAD_EXTENSIONS:
        return None
    return f"images of this kind are not read; convert the image to one of {', '.join(FORMATS)}"


def from_folder(
    folder: Path, fixed: str | None, pairs: bool = False, several: bool = False, masks: bool = False
) -> list[ImageItem]:
    """Return the images of `folder` and its subfolders. An unreadable path gives an item with an error.

    A metadata file lists the images of its folder and subfolders, and other images there are skipped with a warning.
    Without a metadata file, the file that `CaptionFiles` finds beside an image has its caption. `fixed`, if given, is
    the caption of all images. With `pairs`, metadata files may name a second image per entry. Images `name.edited.jpg`
    are separate items, and with `masks` also `name.mask.png`. `several` is that of `read_caption`.

    Raises:
        UserError: the folder has both images and tars, or a metadata file cannot be read.
    """
    found = walk(folder)
    images = [path for path in found.files if is_image(path)]
    tars = [path for path in found.files if path.suffix == ".tar"]
    if images and tars:
        examples = " and ".join(str(paths[0].relative_to(folder)) for paths in (images, tars))
        raise UserError(f"{folder}: has both images and tars, {examples}; put them into two folders")
    listed = [path for path in (*found.files, *found.unreadable) if path.name in METADATA_FILES]
    lists = {parent: metadata_file(parent) for parent in {path.parent for path in listed}}
    captions = CaptionFiles()
    used: set[Path] = set(lists.values())
    items = _from_lists(folder, images, lists, captions, fixed, used, pairs, several, masks)
    for path in images:
        if not any(parent in lists for parent in path.parents):
            file = captions.of(path)
            used |= {file} if file else set()
            caption, error = (fixed, None) if fixed is not None else read_caption(file, several)
            name = path.relative_to(folder).as_posix()
            items.append(ImageItem(name, path, caption=caption, error=error or kind_error(path)))
    for path, reason in found.unreadable.items():
        if is_image(path) or reason.startswith("the folder"):
            items.append(ImageItem(path.relative_to(folder).as_posix(), path, error=reason))
    say_hidden(folder, found.hidden, found.unreadable)
    skipped = SkippedFiles(folder)
    skipped.add(set(found.files) - set(images) - set(tars) - used, images)
    skipped.log()
    return sorted(items, key=lambda item: folder / item.name) if not _is_one_list(folder, lists) else items


def _is_one_list(folder: Path, lists: dict[Path, Path | None]) -> bool:
    """Return True if one metadata file lists all images and determines their order."""
    return list(lists) == [folder]


def _from_lists(
    folder: Path,
    images: Sequence[Path],
    lists: dict[Path, Path | None],
    captions: CaptionFiles,
    fixed: str | None,
    used: set[Path],
    pairs: bool,
    several: bool,
    masks: bool,
) -> list[ImageItem]:
    """Return the items of the metadata files in `lists`, by folder. Add to `used` each caption file that is read."""
    items: list[ImageItem] = []
    spelled = {same_name(path.as_posix()): path for path in images}
    for parent in sorted(lists):
        for entry in from_metadata(lists[parent], pairs, several=several):
            found = partial(_spelled, spelled=spelled)
            item, file = listed_item(folder, parent, entry, found, captions, fixed, several)
            used |= {file} if file else set()
            items.append(item)
    named = {item.path for item in items} | {item.edited.path for item in items if item.edited}
    unnamed: dict[Path, list[Path]] = {}
    for path in images:
        parent = next((parent for parent in path.parents if parent in lists), None)
        if parent is None or path in named:
            continue
        if (pairs and is_edited(path)) or (masks and is_mask(path)):
            items.append(ImageItem(path.relative_to(folder).as_posix(), path))
        else:
            unnamed.setdefault(parent, []).append(path)
    for parent, paths in unnamed.items():
        warn_of_unlisted(folder, len(paths), paths[0], lists[parent])
    return items


def listed_item(
    folder: Path,
    parent: Path,
    entry: Entry,
    found: Callable[[Path], Path],
    captions: CaptionFiles,
    fixed: str | None,
    several: bool,
) -> tuple[ImageItem, Path | None]:
    """Return the item of an entry in the metadata file of the folder `parent`, and the caption file read, or None.

    `found` returns the path of an image whose name has another spelling. The others are as in `from_folder`.
    """
    path, edited = (name and found(parent / name) for name in (entry.name, entry.edited))
    caption, error, file = entry.caption if fixed is None else fixed, None, None
    if caption is None:
        file = captions.of(path)
        caption, error = read_caption(file, several)
    other = edited and ImageItem(edited.relative_to(folder).as_posix(), edited)
    return ImageItem(path.relative_to(folder).as_posix(), path, None, caption, error, other), file


def warn_of_unlisted(folder: Path, count: int, example: Path, file: Path) -> None:
    """Log a warning of `count` images in `folder`, such as `example`, which the metadata `file` does not list."""
    logger.warning(
        "%s: %d images skipped, such as %s, because they are not in %s",
        folder, count, example.relative_to(folder), file.relative_to(folder),
    )  # fmt: skip


def occurs_twice(path: Path) -> UserError:
    """Return the error of an image or tar that occurs twice."""
    return UserError(f"{path}: occurs twice among the images")


def _spelled(path: Path, spelled: dict[str, Path]) -> Path:
    """Return `path`, or the file of another spelling of its name, if there is one."""
    return path if os.path.lexists(path) else spelled.get(same_name(path.as_posix()), path)


def is_edited(path: Path) -> bool:
    """Return True for an image with a name such as `name.edited.jpg`, the second image of a pair."""
    return path.stem.lower().endswith(EDITED)


def is_mask(path: Path) -> bool:
    """Return True for an image with a name such as `name.mask.png`, a loss mask."""
    return path.stem.lower().endswith(MASK_ENDING)


def digest_images(items: Iterable[ImageItem]) -> str:
    """Return the SHA-256, in hex, of names, captions and file sizes of `items`. The images are not opened."""
    hashed = hashlib.sha256()
    for item in items:
        hashed.update(described(item))
    return hashed.hexdigest()


def described(item: ImageItem) -> bytes:
    """Return what `digest_images` takes from `item`, and from its edited image and mask."""
    lines = []
    for image in filter(None, (item, item.edited, item.mask)):
        try:
            size = image.span[1] if image.span else image.path.stat().st_size
        except OSError:
            size = None
        lines.append(json.dumps([image.name, image.caption, image.error, size]).encode() + b"\n")
    return b"".join(lines)
