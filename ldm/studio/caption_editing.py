"""Editing of the captions of a folder of images, with undo. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.files import atomic_write, read_at_most
from ldm.images.caption_writing import caption_files
from ldm.images.captions import CaptionFiles
from ldm.images.find import ImageItem, from_folder
from ldm.images.metadata import METADATA_FILES
from ldm.images.walk import walk
from ldm.studio.allowed_folders import AllowedFolders
from ldm.util import UserError, refuse_if

_MOST_BYTES = 1 << 30  # of a record of changes


def read_images(folder: Path, allowed: AllowedFolders) -> list[ImageItem]:
    """Return the images of `folder` with their captions, as `tools/preencode.py` finds them.

    An image that a link brings in from outside of the `allowed` folders, or whose caption comes from there, has an
    error, and no caption.

    Raises:
        UserError: the folder or its metadata file cannot be read, or a link to a metadata file leads outside.
    """
    for path in walk(folder).files:
        if path.name in METADATA_FILES:
            allowed.check(path, "metadata file")
    files = CaptionFiles()

    def checked(item: ImageItem) -> ImageItem:
        if all(path is None or allowed.has(path) for path in (item.path, files.of(item.path))):
            return item
        return replace(item, caption=None, error="a link leads out of the folders that this studio may read")

    return [checked(item) for item in from_folder(folder, None)]


def replace_text(items: Sequence[ImageItem], old: str, new: str) -> dict[str, str]:
    """Return the captions, by name, that contain `old`, with `new` in its place.

    Raises:
        UserError: `old` is empty, or no caption contains it.
    """
    refuse_if(not old, "find: is empty; give the text to replace")
    changed = {item.name: item.caption.replace(old, new) for item in items if item.caption and old in item.caption}
    refuse_if(not changed, f"find {old!r:.100}: no caption contains it")
    return changed


def tag_counts(items: Sequence[ImageItem]) -> list[list[Any]]:
    """Return the tags, the parts of captions between commas, and the number of images that have each."""
    counts = Counter(tag for item in items for tag in {part.strip() for part in (item.caption or "").split(",")} if tag)
    return [[tag, count] for tag, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


class CaptionEdits:
    """Changes of caption files. Each is recorded in `folder` before it is made, so that it can be undone later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, images: Path, items: Sequence[ImageItem], captions: Mapping[str, str]) -> None:
        """Write `captions` of `items`, by name. Each file is replaced at once; all are prepared first.

        Raises:
            UserError: an image is not in the folder, or a file cannot be changed.
        """
        new = caption_files(images, items, captions)
        old = {path: _read(path) for path in new}
        record = {
            "images": str(images.resolve()),
            "files": [{"path": str(path.absolute()), "before": old[path], "after": _digest(text)}
                      for path, text in new.items()],
        }  # fmt: skip
        with atomic_write(self.folder / f"{time.time_ns():020}.json") as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
        for path, text in new.items():
            _write(path, text)

    def undo(self, images: Path) -> int:
        """Undo the last change in the folder `images`, and return the number of files.

        Raises:
            UserError: there is none, or a file has changed since.
        """
        for place in sorted(self.folder.glob("*.json"), reverse=True):
            files = _read_record(place, images)
            if files is not None:
                return _restore(place, files)
        raise UserError("undo: no change of this folder is left to undo")


def _read_record(place: Path, images: Path) -> list[dict[str, Any]] | None:
    """Return the files of the change recorded at `place`, None if it is damaged or of another folder than `images`."""
    try:
        record = json.loads(read_at_most(place, _MOST_BYTES))
        files = [{key: file[key] for key in ("path", "before", "after")} for file in record["files"]]
        return files if record["images"] == str(images.resolve()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _restore(place: Path, files: Sequence[Mapping[str, Any]]) -> int:
    for file in files:
        text = _read(Path(file["path"]))
        # A file that is as before was not reached by a change that broke off.
        if text != file["before"] and (text is None or _digest(text) != file["after"]):
            raise UserError(f"{file['path']}: has changed since; undo would lose that change")
    for file in files:
        if file["before"] is None:
            Path(file["path"]).unlink(missing_ok=True)
        else:
            _write(Path(file["path"]), file["before"])
    place.unlink()
    return len(files)


def _read(path: Path) -> str | None:
    """Return the content as Latin-1, which keeps all bytes; None if there is no file."""
    try:
        return read_at_most(path, _MOST_BYTES).decode("latin-1")
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode("latin-1"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("latin-1")).hexdigest()
