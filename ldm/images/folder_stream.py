"""Images of a folder in the order of `from_folder`, listed one folder at a time.

Memory holds the names of the files in one folder and in those above it, so it does not grow with the number of images
if they are spread over folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ldm.images.captions import CaptionFiles, read_caption
from ldm.images.decode import is_image
from ldm.images.find import ImageItem, kind_error
from ldm.images.metadata import METADATA_FILES
from ldm.images.skipped_files import SkippedFiles, is_hidden_input, say_hidden
from ldm.images.walk import fault_of, folder_fault, is_folder


@dataclass
class FolderStream:
    """Images of `folder` and its subfolders. `survey` finds those folders that this class can read.

    Args:
        fixed, several: those of `from_folder`.
    """

    folder: Path
    fixed: str | None = None
    several: bool = False
    count: int = 0  # images
    hidden: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    @classmethod
    def survey(cls, folder: Path, fixed: str | None = None, several: bool = False) -> FolderStream | None:
        """Return the stream of `folder`, and log hidden images. Return None if `from_folder` must read or refuse it.

        Such a folder has no images, or has metadata files, tars, or links to folders.
        """
        stream, seen, waiting = cls(folder, fixed, several), set(), [folder]
        while waiting:
            current = waiting.pop()
            try:
                state = Path(current).stat()
                if (state.st_dev, state.st_ino) in seen:
                    return None
                seen.add((state.st_dev, state.st_ino))
                with os.scandir(current) as listing:
                    if not stream._takes(listing, waiting):
                        return None
            except OSError:
                if current == folder:
                    return None
                stream.count += 1  # an item with an error
                stream.unreadable.append(Path(current))
        if not stream.count:
            return None
        say_hidden(folder, stream.hidden, stream.unreadable)
        return stream

    def _takes(self, listing: Iterator[os.DirEntry[str]], waiting: list[str | Path]) -> bool:
        """Count the entries of a folder, and add its subfolders to `waiting`. Return False if `survey` returns None."""
        for entry in listing:
            if entry.name.startswith("."):
                if is_hidden_input(Path(entry.path)):
                    self.hidden.append(Path(entry.path))
            elif is_folder(entry):
                if entry.is_symlink():
                    return False
                waiting.append(entry.path)
            elif entry.name in METADATA_FILES or entry.name.endswith(".tar"):
                return False
            else:
                self.count += is_image(entry.name)
                if fault_of(entry) is not None:
                    self.unreadable.append(Path(entry.path))
        return True

    def __iter__(self) -> Iterator[ImageItem]:
        """Yield the images, then log what was left out."""
        skipped = SkippedFiles(self.folder)
        yield from self._items(self.folder, skipped)
        skipped.log()

    def _items(self, folder: Path, skipped: SkippedFiles) -> Iterator[ImageItem]:
        try:
            with os.scandir(folder) as listing:
                found = sorted(
                    (entry.name, is_folder(entry), fault_of(entry)) for entry in listing if entry.name[0] != "."
                )
        except OSError as error:
            yield ImageItem(self._name(folder), folder, error=folder_fault(error))
            return
        captions, used = CaptionFiles(), set()
        for name, is_parent, fault in found:
            path = folder / name
            if is_parent:
                yield from self._items(path, skipped)
            elif is_image(name):
                item, file = self._item(path, fault, captions)
                used.add(file and file.name)
                yield item
        files = [name for name, is_parent, fault in found if not is_parent and fault is None]
        others = [folder / name for name in files if name not in used and not is_image(name)]
        skipped.add(others, (folder / name for name in files if is_image(name)))

    def _item(self, path: Path, fault: str | None, captions: CaptionFiles) -> tuple[ImageItem, Path | None]:
        """Return the item of an image, and its caption file."""
        if fault is not None:
            return ImageItem(self._name(path), path, error=fault), None
        file = captions.of(path)
        caption, error = (self.fixed, None) if self.fixed is not None else read_caption(file, self.several)
        return ImageItem(self._name(path), path, caption=caption, error=error or kind_error(path)), file

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()
