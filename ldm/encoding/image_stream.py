"""Images of tars and folders that are read while they are encoded, so that encoding begins at once.

Memory does not grow with the number of images: one tar, or the names of one folder, are known at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.data.sources import (
    NAMED,
    from_tar,
    no_captions,
    no_images,
    no_pairs,
    occurs_twice,
    warn_of_missing,
)
from ldm.images.find import ImageItem, from_folder, is_mask, pair_up
from ldm.images.folder_stream import FolderStream
from ldm.images.mask_files import is_transparent, no_masks, warn_of_mask_names
from ldm.images.repeats import FolderRepeats
from ldm.shards.urls import expand_urls, is_stream

logger = logging.getLogger(__name__)

Change = Callable[[ImageItem], ImageItem]


@dataclass(frozen=True)
class Tars:
    """Tars of one source. `prefix` is that of their images' names, among several sources."""

    source: str
    paths: Sequence[Path]
    prefix: str = ""


class TarSource:
    """Images of tars in the order of `find_images`, with its options."""

    def __init__(self, groups: Sequence[Tars], fixed: str | None, pairs: bool, several: bool, masks: bool) -> None:
        self.groups, self.options = groups, (fixed, pairs, several, masks)
        self._newest: tuple[Path | None, list[ImageItem]] = None, []

    def __iter__(self) -> Iterator[ImageItem]:
        for group in self.groups:
            is_empty = True
            for path in group.paths:
                for item in self._of(path):
                    is_empty = False
                    yield replace(item, name=f"{group.prefix}/{item.name}") if group.prefix else item
            if is_empty:
                raise no_images(group.source)

    def _of(self, path: Path) -> list[ImageItem]:
        """Return the images of a tar; those of the newest one are kept, for a second look."""
        if self._newest[0] != path:
            fixed, pairs, several, masks = self.options
            items = from_tar(path, fixed, pairs, several, masks)
            self._newest = path, pair_up(items) if pairs else items
        return self._newest[1]


class ImageStream:
    """Images of `source`, each changed by `changes`. An iteration reads them anew, and then logs what is missing.

    The constructor reads as far as it needs to know that the images have captions, masks or pairs as asked for.

    Args:
        where: names of the sources, for messages.
        count: number of images or tars, with the noun.
        fixed: one caption is given for all images.
        may_have_several: images may have several captions.

    Raises:
        UserError: as `find_images`. What is wrong with later tars is raised when they are read.
    """

    def __init__(
        self,
        where: str,
        count: str,
        source: Iterable[ImageItem],
        changes: Sequence[Change] = (),
        repeats: FolderRepeats | None = None,
        *,
        fixed: bool = False,
        pairs: bool = False,
        masks: bool = False,
        may_have_several: bool = False,
    ) -> None:
        self.where, self.count, self._masks = where, count, masks
        self._source, self._changes, self._repeats = source, changes, repeats
        if pairs and not any(item.edited for item in source):
            raise no_pairs(where)
        if masks and not any(item.mask or is_transparent(item) for item in source):
            raise no_masks()
        if not fixed and all(item.caption is None for item in source) and any(item.error is None for item in source):
            raise no_captions(where)
        self.has_several = may_have_several and any("\n" in (item.caption or "") for item in self._changed())

    def _changed(self) -> Iterator[ImageItem]:
        for item in self._source:
            for change in self._changes:
                item = change(item)
            yield item

    def __iter__(self) -> Iterator[ImageItem]:
        missing: list[str] = []
        named: list[str] = []
        count = 0
        for item in self._changed():
            if item.caption is None and item.error is None:
                count += 1
                missing += [item.name] if len(missing) < NAMED else []
            if not self._masks and item.span is None and is_mask(item.path):
                named.append(item.name)
            yield self._repeats.of(item) if self._repeats else item
        if self._repeats:
            self._repeats.log()
        warn_of_mask_names(named)
        warn_of_missing(self.where, count, missing)


def open_images(
    sources: Sequence[str],
    caption: str | None = None,
    pairs: bool = False,
    several: bool = False,
    masks: bool = False,
    changes: Sequence[Change] = (),
    repeats: FolderRepeats | None = None,
    may_have_several: bool = False,
) -> ImageStream | None:
    """Return the images of `find_images` as a stream; None for sources that must be read as a whole first.

    Streams are tars, and a single folder without metadata files, pairs, masks and links to folders.

    Raises:
        UserError: as `find_images`.
    """
    fixed = None if caption is None else " ".join(caption.split())
    flags = {"fixed": fixed is not None, "pairs": pairs, "masks": masks, "may_have_several": may_have_several}
    where = ", ".join(sources)
    if len(sources) == 1 and not pairs and not masks and Path(sources[0]).is_dir():
        folder = FolderStream.survey(Path(sources[0]), fixed, several)
        if folder is not None:
            return ImageStream(where, f"{folder.count} images", folder, changes, repeats, **flags)
    groups = _tars(sources, fixed, pairs, several, masks)
    if groups is None:
        return None
    count = f"images of {sum(len(group.paths) for group in groups)} tars"
    return ImageStream(where, count, TarSource(groups, fixed, pairs, several, masks), changes, repeats, **flags)


def _tars(sources: Sequence[str], fixed: str | None, pairs: bool, several: bool, masks: bool) -> list[Tars] | None:
    """Return the tars of `sources`; None if they have anything else."""
    groups, seen = [], set()
    for source in sources:
        path = Path(source)
        if path.is_dir() and (not any(path.glob("[!.]*.tar")) or from_folder(path, fixed, pairs, several, masks)):
            return None
        if not path.is_dir() and not source.endswith(".tar"):
            return None
        urls = expand_urls(source)
        if any(is_stream(url) or not url.endswith(".tar") for url in urls):
            return None
        paths = [Path(url) for url in urls]
        places = {path.resolve() for path in paths}
        if seen & places:
            raise occurs_twice(min(seen & places))
        seen |= places
        groups.append(Tars(source, paths, path.name if len(sources) > 1 and path.is_dir() else ""))
    return groups
