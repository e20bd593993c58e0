"""Images of tars and folders that are read while they are encoded, so that encoding begins at once.

Memory hardly grows with the number of images: one tar, or the names of one folder, are known at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from ldm.data.image_sources import (
    NAMED,
    from_tar,
    no_captions,
    no_images,
    no_pairs,
    warn_of_missing,
)
from ldm.images.find import ImageItem, from_folder, is_mask, occurs_twice
from ldm.images.folder_stream import FolderStream
from ldm.images.mask_files import has_masks, no_masks, warn_of_mask_names
from ldm.images.mask_stream import MaskedImages
from ldm.images.pairs import pair_up
from ldm.images.repeats import FolderRepeats
from ldm.shards.urls import expand_urls, is_stream

logger = logging.getLogger(__name__)

Change = Callable[[ImageItem], ImageItem]


TarOptions = tuple[str | None, bool, bool, bool]  # fixed, pairs, several, masks: those of `from_tar`


@dataclass(frozen=True)
class Tars:
    """Tars of one source."""

    source: str
    paths: Sequence[Path]


class TarSource:
    """Images of tars in the order of `find_images`."""

    def __init__(self, tars: Tars, options: TarOptions) -> None:
        self.tars, self.options = tars, options
        self._newest: tuple[Path | None, list[ImageItem]] = None, []

    def __iter__(self) -> Iterator[ImageItem]:
        is_empty = True
        for path in self.tars.paths:
            for item in self._of(path):
                is_empty = False
                yield item
        if is_empty:
            raise no_images(self.tars.source)

    def _of(self, path: Path) -> list[ImageItem]:
        """Return the images of a tar; those of the newest one are kept, for a second look."""
        if self._newest[0] != path:
            fixed, pairs, several, masks = self.options
            items = from_tar(path, fixed, pairs, several, masks)
            self._newest = path, pair_up(items) if pairs else items
        return self._newest[1]


class Named(NamedTuple):
    """Images of one source, and a `prefix` of their names, or None."""

    images: Iterable[ImageItem]
    prefix: str | None


@dataclass(frozen=True)
class JoinedSources:
    """Images of several sources, one after the other."""

    sources: Sequence[Named]

    def __iter__(self) -> Iterator[ImageItem]:
        for images, prefix in self.sources:
            for item in images:
                yield item if prefix is None else replace(item, name=f"{prefix}/{item.name}")


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
        if masks and not has_masks(source):
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
        named: list[str] = []  # the first image that is named like a mask
        count = masks = 0
        for item in self._changed():
            if item.caption is None and item.error is None:
                count += 1
                missing += [item.name] if len(missing) < NAMED else []
            if not self._masks and item.span is None and is_mask(item.path):
                masks += 1
                named = named or [item.name]
            yield self._repeats.of(item) if self._repeats else item
        if self._repeats:
            self._repeats.log()
        warn_of_mask_names(masks, *named)
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

    Streams are tars, and folders of `FolderStream`. Several folders must have no links, and no pairs and masks.

    Raises:
        UserError: as `find_images`.
    """
    fixed = None if caption is None else " ".join(caption.split())
    found = _sources(sources, fixed, pairs, several, masks)
    if found is None or _may_overlap(found):
        return None
    folders = [source for source in found if isinstance(source, FolderStream)]
    tars = sum(len(source.paths) for source in found if isinstance(source, Tars))
    for folder in folders:
        folder.announce()
    counts = [f"{sum(folder.count for folder in folders)} images"] if folders else []
    counts += [f"images of {tars} tars"] if tars else []
    options = fixed, pairs, several, masks
    joined = JoinedSources([_named(source, options, len(found) > 1) for source in found])
    flags = {"fixed": fixed is not None, "pairs": pairs, "masks": masks, "may_have_several": may_have_several}
    return ImageStream(", ".join(sources), " and ".join(counts), joined, changes, repeats, **flags)


def _sources(
    sources: Sequence[str], fixed: str | None, pairs: bool, several: bool, masks: bool
) -> list[FolderStream | Tars] | None:
    """Return the streams of `sources`; None if one of them must be read as a whole."""
    found: list[FolderStream | Tars] = []
    for source in sources:
        folder = None
        if Path(source).is_dir() and (len(sources) == 1 or not (pairs or masks)):
            folder = FolderStream.survey(Path(source), fixed, several, pairs, masks)
        part = folder or _tars(source, fixed, pairs, several, masks)
        if part is None:
            return None
        found.append(part)
    return found


def _tars(source: str, fixed: str | None, pairs: bool, several: bool, masks: bool) -> Tars | None:
    """Return the tars of `source`; None if it has anything else."""
    path = Path(source)
    if path.is_dir() and (not any(path.glob("[!.]*.tar")) or from_folder(path, fixed, pairs, several, masks)):
        return None
    if not path.is_dir() and not source.endswith(".tar"):
        return None
    urls = expand_urls(source)
    if any(is_stream(url) or not url.endswith(".tar") for url in urls):
        return None
    return Tars(source, [Path(url) for url in urls])


def _may_overlap(sources: Sequence[FolderStream | Tars]) -> bool:
    """Return True if two folders may have an image in common.

    Raises:
        UserError: two sources have a tar in common.
    """
    seen: set[Path] = set()
    for tars in (source for source in sources if isinstance(source, Tars)):
        places = {path.resolve() for path in tars.paths}
        if seen & places:
            raise occurs_twice(min(seen & places))
        seen |= places
    folders = [source for source in sources if isinstance(source, FolderStream)]
    roots = [folder.folder.resolve() for folder in folders]
    is_nested = any(one.is_relative_to(other) for one, other in permutations(roots, 2))
    return len(folders) > 1 and (is_nested or any(folder.has_links for folder in folders))


def _named(source: FolderStream | Tars, options: TarOptions, is_one_of_several: bool) -> Named:
    """Return the images of `source`. If it is one of several sources, their prefix is the name of its folder."""
    is_tars = isinstance(source, Tars)
    folder = Path(source.source) if is_tars else source.folder
    prefix = folder.name if is_one_of_several and folder.is_dir() else None
    if is_tars:
        return Named(TarSource(source, options), prefix)
    return Named(MaskedImages(source) if options[-1] else source, prefix)
