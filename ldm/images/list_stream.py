"""Images of a folder with a metadata file, which is read again for each iteration.

Memory holds a few bytes per image: hashes of names, to find those that occur twice and those that are not listed.
"""

from __future__ import annotations

import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ldm.images.captions import CaptionFiles, same_name
from ldm.images.decode import is_image
from ldm.images.find import ImageItem, listed_item, occurs_twice, warn_of_unlisted
from ldm.images.metadata import Entry, entries_of, metadata_file, warn_of_unread
from ldm.images.skipped_files import SkippedFiles
from ldm.images.walk import fault_of, is_folder


class NameHashes:
    """Set of names that takes 8 bytes for each. It has a wrong one once in 10^12 times."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._sorted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, name: str) -> None:
        """Add `name`, before `has` or `repeated` are called."""
        self._hashes.append(hash(name))

    def has(self, names: Iterable[str]) -> np.ndarray:
        """Return, per name, True if it was added."""
        found = np.fromiter(map(hash, names), np.int64)
        if not self._hashes:
            return np.zeros(len(found), bool)
        places = self._in_order().searchsorted(found).clip(max=len(self) - 1)
        return self._in_order()[places] == found

    def repeated(self) -> set[int]:
        """Return the hashes of names that were added more than once."""
        values = self._in_order()
        return set(values[1:][values[1:] == values[:-1]].tolist())

    def _in_order(self) -> np.ndarray:
        if self._sorted is None:
            self._sorted = np.frombuffer(self._hashes, np.int64)
            self._sorted.sort()
        return self._sorted


class ListedFolder:
    """Images that the metadata file of `folder` lists, in the order of `from_folder`.

    Links to folders, and other metadata files below the folder, are not supported.

    Args:
        root: folder of the source, from which `folder` may differ.
        fixed, several: those of `from_folder`.

    Raises:
        UserError: an entry of the file cannot be read, or an image is listed twice.
    """

    def __init__(self, root: Path, folder: Path, fixed: str | None, several: bool) -> None:
        self.root, self.folder, self.fixed, self.several = root, folder, fixed, several
        self.file = metadata_file(folder)
        self.unread: dict[str, None] = {}
        self._other_spellings: dict[str, Path] | None = None
        names = NameHashes()
        for entry in self._entries(self.unread):
            names.add(_folded(entry.name))
        self.count = len(names)
        self._check_repeats(names.repeated())

    def _entries(self, unread: dict[str, None]) -> Iterator[Entry]:
        return entries_of(self.file, False, None, None, self.several, unread)

    def _check_repeats(self, hashes: set[int]) -> None:
        """Raise `UserError` if two entries, whose names have one of `hashes`, are of one image."""
        if not hashes:
            return
        names = (entry.name for entry in self._entries({}) if hash(_folded(entry.name)) in hashes)
        twice = [
            path for path, count in Counter(self._found(self.folder / name) for name in names).items() if count > 1
        ]
        if twice:
            raise occurs_twice(min(twice))

    def announce(self) -> None:
        """Log a warning of unknown keys in the metadata file."""
        warn_of_unread(self.file, self.unread)

    def items(self, skipped: SkippedFiles) -> Iterator[ImageItem]:
        """Yield the images, then add the files that are not read to `skipped`, and log a warning of unlisted images."""
        named, used, captions = NameHashes(), NameHashes(), CaptionFiles()
        used.add(self.file.name)

        def arriving() -> Iterator[ImageItem]:
            for entry in self._entries({}):
                item, file = listed_item(self.root, self.folder, entry, self._found, captions, self.fixed, self.several)
                named.add(self._inside(item.path))
                if file is not None:
                    used.add(self._inside(file))
                yield item

        one_list = self.folder == self.root
        yield from arriving() if one_list else sorted(arriving(), key=lambda item: self.root / item.name)
        self._add_rest(named, used, skipped)

    def _add_rest(self, named: NameHashes, used: NameHashes, skipped: SkippedFiles) -> None:
        """Add the files that are neither `used` nor images, and count the images that are not `named`."""
        unlisted, example = 0, None
        for folder, names in self._files():
            inside = "" if folder == self.folder else f"{self._inside(folder)}/"
            images = [name for name in names if is_image(name)]
            others = [name for name in names if not is_image(name)]
            alone = _without(images, named.has(inside + name for name in images))
            unused = _without(others, used.has(inside + name for name in others))
            if alone:
                unlisted += len(alone)
                first = folder / min(alone)
                example = min(first, example or first)
            skipped.add([folder / name for name in unused], (folder / name for name in images))
        if example is not None:
            warn_of_unlisted(self.root, unlisted, example, self.file)

    def _files(self) -> Iterator[tuple[Path, list[str]]]:
        """Yield this folder and each one in it, with the names of its files, without hidden and unreadable ones."""
        waiting = [self.folder]
        while waiting:
            folder, names = waiting.pop(), []
            with os.scandir(folder) as listing:
                for entry in listing:
                    if entry.name.startswith("."):
                        continue
                    if is_folder(entry):
                        waiting.append(folder / entry.name)
                    elif fault_of(entry) is None:
                        names.append(entry.name)
            yield folder, names

    def _found(self, path: Path) -> Path:
        """Return `path`, or the image of another spelling of its name, if there is one."""
        if os.path.lexists(path):
            return path
        if self._other_spellings is None:
            self._other_spellings = self._spelled_otherwise()
        normal = same_name(self._inside(path))
        plain = self.folder / normal
        is_hidden = any(part.startswith(".") for part in PurePosixPath(normal).parts)
        is_there = is_image(plain) and not is_hidden and plain.is_file()
        found = [self._other_spellings.get(normal), plain if is_there else None]
        return max(filter(None, found), default=path)

    def _spelled_otherwise(self) -> dict[str, Path]:
        """Return the images whose names are not in their normal form, by that."""
        found: dict[str, Path] = {}
        for folder, names in self._files():
            for path in (folder / name for name in names if is_image(name)):
                normal = same_name(self._inside(path))
                if normal != self._inside(path):
                    found[normal] = max(path, found.get(normal, path))
        return found

    def _inside(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _without(names: Sequence[str], are_out: np.ndarray) -> list[str]:
    return [name for name, is_out in zip(names, are_out.tolist(), strict=True) if not is_out]


def _folded(name: str) -> str:
    """Return a form of `name` that is equal for all names that one image is found by."""
    return unicodedata.normalize("NFC", name).lower()
