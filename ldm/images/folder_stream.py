"""Images of a folder in the order of `from_folder`, listed one folder at a time.

Memory holds the names of the files in one folder and in those above it, so it does not grow with the number of images
if they are spread over folders. Images that a metadata file lists are read in its order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldm.images.captions import CaptionFiles, read_caption, same_name
from ldm.images.decode import is_image
from ldm.images.find import ImageItem, is_edited, kind_error
from ldm.images.list_stream import ListedFolder
from ldm.images.metadata import METADATA_FILES
from ldm.images.pairs import NAMED, name_of_original, pair_of, warn_of_edited
from ldm.images.skipped_files import SkippedFiles, is_hidden_input, say_hidden
from ldm.images.walk import ReadFolders, fault_of, folder_fault, is_folder, warn_of_link


@dataclass
class FolderStream:
    """Images of `folder` and its subfolders. `survey` finds those folders that this class can read.

    Args:
        fixed, several: those of `from_folder`.
        pairs: yield pairs of images; see `pair_up`.
    """

    folder: Path
    fixed: str | None = None
    several: bool = False
    pairs: bool = False
    count: int = 0  # images
    hidden: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    listed: dict[Path, ListedFolder] = field(default_factory=dict)  # folders with metadata files
    repeated: dict[Path, Path] = field(default_factory=dict)  # folders that are skipped, and where they lead to
    has_links: bool = False

    @classmethod
    def survey(
        cls,
        folder: Path,
        fixed: str | None = None,
        several: bool = False,
        pairs: bool = False,
        masks: bool = False,
    ) -> FolderStream | None:
        """Return the stream of `folder`. Return None if `from_folder` must read or refuse it.

        Such a folder has no images, or has tars, or a metadata file with unreadable paths, links to folders or further
        metadata files below it. With `pairs`, it has unreadable paths, and with `pairs` or `masks`, a metadata file.

        Raises:
            UserError: a metadata file cannot be read, or lists an image twice.
        """
        stream = cls(folder, fixed, several, pairs)
        if not _Survey(stream, no_lists=pairs or masks).is_read():
            return None
        return stream if stream.count and not (pairs and stream.unreadable) else None

    def announce(self) -> None:
        """Log warnings of what the survey found."""
        for link, first in self.repeated.items():
            warn_of_link(link, first)
        say_hidden(self.folder, self.hidden, self.unreadable)
        for listed in self.listed.values():
            listed.announce()

    def __iter__(self) -> Iterator[ImageItem]:
        """Yield the images, then log what was left out."""
        left_out = _LeftOut(SkippedFiles(self.folder))
        yield from self._items(self.folder, left_out)
        left_out.files.log()
        warn_of_edited(left_out.edited, left_out.count)

    def _items(self, folder: Path, left_out: _LeftOut) -> Iterator[ImageItem]:
        if folder in self.listed:
            yield from self.listed[folder].items(left_out.files)
            return
        try:
            with os.scandir(folder) as listing:
                found = sorted(
                    (entry.name, is_folder(entry), fault_of(entry)) for entry in listing if entry.name[0] != "."
                )
        except OSError as error:
            yield ImageItem(self._name(folder), folder, error=folder_fault(error))
            return
        captions, used = CaptionFiles(), set()
        edited = {}  # names of the edited images without an original so far, by its name
        if self.pairs:
            names = (Path(name) for name, is_parent, _ in found if not is_parent and is_image(name))
            edited = {name_of_original(name): name.name for name in names if is_edited(name)}
        for name, is_parent, fault in found:
            path = folder / name
            if is_parent:
                if path not in self.repeated:
                    yield from self._items(path, left_out)
            elif is_image(name):
                item, file = self._item(path, fault, captions)
                used.add(file and file.name)
                if not self.pairs:
                    yield item
                elif not is_edited(path):
                    other = edited.pop(same_name(path.stem), None)
                    yield pair_of(item, other and self._item(folder / other, None, captions)[0])
        left_out.add_edited([self._name(folder / name) for name in edited.values()])
        files = [name for name, is_parent, fault in found if not is_parent and fault is None]
        others = [folder / name for name in files if name not in used and not is_image(name)]
        left_out.files.add(others, (folder / name for name in files if is_image(name)))

    def _item(self, path: Path, fault: str | None, captions: CaptionFiles) -> tuple[ImageItem, Path | None]:
        """Return the item of an image, and its caption file."""
        if fault is not None:
            return ImageItem(self._name(path), path, error=fault), None
        file = captions.of(path)
        caption, error = (self.fixed, None) if self.fixed is not None else read_caption(file, self.several)
        return ImageItem(self._name(path), path, caption=caption, error=error or kind_error(path)), file

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


@dataclass
class _LeftOut:
    """Files that are not read, and edited images without an original: how many, and the names of the first."""

    files: SkippedFiles
    edited: list[str] = field(default_factory=list)
    count: int = 0

    def add_edited(self, names: Sequence[str]) -> None:
        self.count += len(names)
        self.edited = sorted([*self.edited, *names], key=PurePosixPath)[:NAMED]


class _Survey:
    """Walk through a folder in the order of `walk`, which notes in its `stream` what is there."""

    def __init__(self, stream: FolderStream, no_lists: bool) -> None:
        self.stream, self._no_lists = stream, no_lists
        self._links: list[Path] = []  # to folders
        self._seen = ReadFolders()

    def is_read(self) -> bool:
        """Survey the folder. Return False if its stream cannot be read."""
        stream = self.stream
        if not self._walk(stream.folder):
            return False
        for link in self._links:  # grows in the loop, as in `walk`
            if not self._walk(link):
                return False
        stream.has_links |= bool(self._links)
        if stream.listed and (stream.unreadable or self._links or stream.repeated):
            return False
        stream.listed = {
            folder: ListedFolder(stream.folder, folder, stream.fixed, stream.several) for folder in stream.listed
        }
        stream.count += sum(listed.count for listed in stream.listed.values())
        return True

    def _walk(self, start: Path) -> bool:
        stream, waiting = self.stream, [(start, False)]
        while waiting:
            folder, is_listed = waiting.pop()
            try:
                if (first := self._seen.first_path(folder)) != folder:
                    stream.repeated[folder] = first
                    continue
                with os.scandir(folder) as listing:
                    found = self._look(folder, listing)
            except OSError:
                if folder == stream.folder:
                    return False
                stream.count += 1  # an item with an error
                stream.unreadable.append(folder)
                continue
            if found is None:
                return False
            images, has_list, folders = found
            if has_list and (is_listed or self._no_lists):
                return False
            if has_list:
                stream.listed[folder] = None
            stream.count += 0 if is_listed or has_list else images
            waiting += [(folder / name, is_listed or has_list) for name in sorted(folders)]
        return True

    def _look(self, folder: Path, listing: Iterator[os.DirEntry[str]]) -> tuple[int, bool, list[str]] | None:
        """Return the number of images in `folder`, if it has a metadata file, and its folders; None if it has tars."""
        stream, images, has_list, folders, links = self.stream, 0, False, [], []
        for entry in listing:
            if entry.name.startswith("."):
                if is_hidden_input(Path(entry.path)):
                    stream.hidden.append(Path(entry.path))
            elif is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.name)
            elif entry.name.endswith(".tar"):
                return None
            else:
                has_list |= entry.name in METADATA_FILES
                images += is_image(entry.name)
                stream.has_links |= entry.is_symlink()
                if fault_of(entry) is not None:
                    stream.unreadable.append(Path(entry.path))
        self._links += [folder / name for name in sorted(links)]
        return images, has_list, folders
