"""Search for images with captions in folders, tars and single files."""

from __future__ import annotations

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.files import open_file, read_span
from ldm.identity import check_identity, identity_of_path
from ldm.images.captions import CAPTION_SUFFIXES, decode_caption, same_name
from ldm.images.decode import EXTENSIONS, is_image
from ldm.images.find import ImageItem, SingleImages, from_folder, occurs_twice
from ldm.images.mask_files import warn_of_masks, with_masks
from ldm.images.metadata import METADATA, METADATA_FILES
from ldm.images.pairs import pair_up
from ldm.shards.tar import index_tar
from ldm.shards.urls import expand_urls, is_stream
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

NAMED = 5  # images listed in a warning

# Members of a tar: the edited images of pairs, and loss masks.
_EDITED, _MASKS = ([f"{kind}.{extension}" for extension in EXTENSIONS] for kind in ("edited", "mask"))


def from_tar(path: Path, fixed: str | None, pairs: bool, several: bool, masks: bool) -> list[ImageItem]:
    """Return the images of the tar at `path`, with the options of `find_images`; `fixed` is its `caption`."""
    items = []
    identity = identity_of_path(path)
    samples = index_tar(path)
    with open_file(path) as file:
        check_identity(file.fileno(), path, identity)
        for sample in samples:
            caption, error = fixed, None
            if fixed is None and "txt" in sample.spans:
                text = read_span(file.fileno(), *sample.spans["txt"], f"{path}: {sample.key}.txt")
                caption, error = decode_caption(text, several)
            extension = next((extension for extension in sample.spans if extension in EXTENSIONS), None)
            if extension is None:
                error = f"no image ({', '.join(EXTENSIONS)}) among its members: {', '.join(sample.spans)}"
                items.append(ImageItem(f"{path.name}/{sample.key}", path, None, caption, error))
            else:
                name = f"{path.name}/{sample.key}"
                span = sample.spans[extension]
                edited = next((found for found in sample.spans if found in _EDITED), None)
                other = None
                if pairs and edited:
                    other = ImageItem(f"{name}.{edited}", path, sample.spans[edited], identity=identity)
                item = ImageItem(f"{name}.{extension}", path, span, caption, error, other, identity)
                mask = next((found for found in sample.spans if found in _MASKS), None) if masks else None
                if mask:
                    item = replace(item, mask=ImageItem(f"{name}.{mask}", path, sample.spans[mask], identity=identity))
                items.append(item)
    return items


def _from_source(source: str, single: SingleImages, pairs: bool, masks: bool) -> list[ImageItem]:
    path = Path(source)
    if os.path.lexists(path) and not path.is_dir() and is_image(path):
        return [single.item(path, path.name)]
    if path.is_dir():
        items = from_folder(path, single.fixed, pairs, single.several, masks)
        if items or not any(path.glob("[!.]*.tar")):
            return items
    items = []
    for url in _without_captions(expand_urls(source)):
        refuse_if(is_stream(url), f"{url}: is not a folder or a local tar; download it first")
        path = Path(url)
        if is_image(path) and not path.is_dir():
            items.append(single.item(path, path.name))
        else:
            items += from_tar(path, single.fixed, pairs, single.several, masks)
    return items


def _without_captions(sources: Sequence[str]) -> list[str]:
    """Return `sources` without caption files, which `folder/*` includes. Log a warning for other files."""
    if len(sources) < 2:
        return list(sources)
    kept, left_out = [], []
    images = [Path(source) for source in sources if is_image(Path(source))]
    stems = {same_name(str(name)) for image in images for name in (image.with_suffix(""), image)}
    for source in sources:
        path = Path(source)
        if not path.is_file() or is_image(path) or tarfile.is_tarfile(path):
            kept.append(source)
        elif path.suffix.lower() in CAPTION_SUFFIXES and same_name(str(path.with_suffix(""))) in stems:
            continue
        elif path.name not in METADATA_FILES and path.suffix.lower() != ".tar":
            left_out.append(source)
        elif path.suffix.lower() == ".tar":
            kept.append(source)  # a damaged tar
    if left_out:
        names = ", ".join(left_out[:5]) + (" ..." if len(left_out) > 5 else "")
        logger.warning("%d files skipped, because they are neither images nor tars: %s", len(left_out), names)
    return kept or list(sources)


def _identity(item: ImageItem) -> tuple[Path, str, Path | None, str | None]:
    """Return what two items of one source must differ in. The images of a tar share its path.

    One image may have several edits, and one edit several instructions.
    """
    pair = (None, None) if item.edited is None else (item.edited.path, item.caption)
    return item.path, item.name, *pair


def find_images(
    source: str | Path | Sequence[str | Path],
    caption: str | None = None,
    pairs: bool = False,
    several: bool = False,
    masks: bool = False,
) -> list[ImageItem]:
    """Return all images of `source`, sorted by name within a folder. `caption`, if given, is the caption of all.

    `source` is a folder of images, a folder of tars, a path, glob or brace pattern of tars, an image, or a list of
    these. Captions of a folder are in `metadata.jsonl`, or in `name.txt` beside each image. Images without a caption
    get the empty caption, with a warning.

    With `several`, each line of a caption file is a caption, and `metadata.jsonl` may have lists of captions.

    With `pairs`, return the images before an edit, each with the image after it. This is `name.edited.jpg` beside
    `name.jpg`, or the second image in an entry of `metadata.jsonl`.

    With `masks`, images `name.mask.png` beside `name.jpg`, and members `mask.png` of tars, are loss masks.

    Raises:
        UserError: there is no image (or pair, or mask), no caption or a repeated image; a folder has both images and
            tars; or `metadata.jsonl` or a tar cannot be read.
    """
    sources = [str(source)] if isinstance(source, (str, Path)) else [str(entry) for entry in source]
    items: list[ImageItem] = []
    seen: set[Path] = set()
    caption = None if caption is None else " ".join(caption.split())  # a line would be a caption of its own
    single = SingleImages(caption, several)
    for entry in _without_captions(sources):
        found = _from_source(entry, single, pairs, masks)
        if not found:
            raise no_images(entry)
        paths = {item.path.resolve() for item in found}
        counts = Counter(map(_identity, found))
        twice = seen & paths | {path for (path, *_), count in counts.items() if count > 1}
        if twice:
            raise occurs_twice(min(twice))
        seen |= paths
        if len(sources) > 1 and Path(entry).is_dir():  # avoids equal names in several folders
            found = [replace(item, name=f"{Path(entry).name}/{item.name}") for item in found]
        items += found
    where = ", ".join(sources)
    if pairs:
        items = pair_up(items)
        if not any(item.edited for item in items):
            raise no_pairs(where)
    if masks:
        items = with_masks(items)
    else:
        warn_of_masks(items)
    missing = [item.name for item in items if item.caption is None and item.error is None]
    if missing and all(item.caption is None for item in items):
        raise no_captions(where)
    warn_of_missing(where, len(missing), missing[:NAMED])
    return items


def no_images(entry: str) -> UserError:
    """Return the error of a source without images."""
    return UserError(f"{entry}: no images ({', '.join(EXTENSIONS)}) and no tars with images")


def no_pairs(where: str) -> UserError:
    """Return the error of sources in which no image has an edited one."""
    return UserError(
        f"{where}: no image has an edited one; give name.edited.jpg beside name.jpg, or the columns "
        f"input_image, edited_image and edit_prompt in {METADATA}"
    )


def no_captions(where: str) -> UserError:
    """Return the error of sources without captions."""
    return UserError(
        f"{where}: no image has a caption; give name.txt beside name.jpg, or {METADATA}, or one caption for all"
    )


def warn_of_missing(where: str, count: int, names: Sequence[str]) -> None:
    """Log a warning if `count` images, the first of them `names`, have no caption."""
    if count:
        shown = ", ".join(names) + (" ..." if count > len(names) else "")
        logger.warning("%s: %d images have no caption and get the empty one: %s", where, count, shown)
