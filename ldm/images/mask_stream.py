"""Loss masks beside the images of a stream, found one folder at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldm.images.find import ImageItem, is_mask
from ldm.images.mask_files import masks_in, warn_of_alone, with_mask


@dataclass
class _Folder:
    """Masks of a folder by the name of their image, those that images have, and the names of all by their paths."""

    masks: dict[str, Path]
    used: set[Path] = field(default_factory=set)
    found: dict[Path, str] = field(default_factory=dict)

    def alone(self) -> list[str]:
        """Return the names of the masks that no image has."""
        return [name for path, name in self.found.items() if path not in self.used]


@dataclass(frozen=True)
class MaskedImages:
    """The `images` of a folder in the order of their paths, as `with_masks` returns them.

    Memory holds the masks of one folder and of those above it.
    """

    images: Iterable[ImageItem]

    def __iter__(self) -> Iterator[ImageItem]:
        """Yield the images, then log a warning of masks without an image."""
        folders: dict[Path, _Folder] = {}
        alone: list[str] = []  # the first name
        count = 0

        def leave(paths: Iterable[Path]) -> None:
            nonlocal alone, count
            for path in paths:
                names = folders.pop(path).alone()
                count += len(names)
                alone = sorted([*alone, *names], key=PurePosixPath)[:1]

        for item in self.images:
            folder = item.path.parent
            if folder not in folders:
                leave([path for path in folders if path not in folder.parents])
                folders[folder] = _Folder(masks_in(folder))
            if is_mask(item.path):
                folders[folder].found[item.path] = item.name
                continue
            item = with_mask(item, folders[folder].masks)
            if item.mask:
                folders[folder].used.add(item.mask.path)
            yield item
        leave(list(folders))
        warn_of_alone(count, *alone)
