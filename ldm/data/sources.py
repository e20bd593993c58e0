"""Images with captions from folders, tars and single files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.files import read_span
from ldm.images.captions import METADATA, decode_caption
from ldm.images.decode import EXTENSIONS, UNREAD_EXTENSIONS
from ldm.images.find import ImageItem, extension_of, from_file, from_folder
from ldm.shards.tar import index_tar
from ldm.shards.urls import expand_urls, is_stream
from ldm.util import UserError

logger = logging.getLogger(__name__)


def _from_tar(path: Path, fixed: str | None) -> list[ImageItem]:
    items = []
    samples = index_tar(path)
    with path.open("rb") as file:
        for sample in samples:
            caption, error = fixed, None
            if fixed is None and "txt" in sample.spans:
                text = read_span(file.fileno(), *sample.spans["txt"], f"{path}: {sample.key}.txt")
                caption, error = decode_caption(text)
            extension = next((extension for extension in sample.spans if extension in EXTENSIONS), None)
            if extension is None:
                error = f"no image ({', '.join(EXTENSIONS)}) among its members: {', '.join(sample.spans)}"
                items.append(ImageItem(f"{path.name}/{sample.key}", path, None, caption, error))
            else:
                name = f"{path.name}/{sample.key}.{extension}"
                items.append(ImageItem(name, path, sample.spans[extension], caption, error))
    return items


def _from_source(source: str, fixed: str | None) -> list[ImageItem]:
    path = Path(source)
    if path.is_file() and extension_of(path) in (*EXTENSIONS, *UNREAD_EXTENSIONS):
        return [from_file(path, path.name, fixed)]
    if path.is_dir():
        items = from_folder(path, fixed)
        if items or not any(path.glob("[!.]*.tar")):
            return items
    items = []
    for url in expand_urls(source):
        if is_stream(url):
            raise UserError(f"{url}: images are read from folders and local tars; fetch it first")
        items += _from_tar(Path(url), fixed)
    return items


def find_images(source: str | Path | Sequence[str | Path], caption: str | None = None) -> list[ImageItem]:
    """Every image of `source`, sorted by name within a folder; `caption`, if given, is the caption of them all.

    `source` is a folder of images (`metadata.jsonl` in it holds the captions, or `name.txt` beside each), a folder
    of tars, tars by path, glob or brace pattern, an image, or a list of these. Images with no caption are told of,
    and get the empty one.

    Raises:
        UserError: there is no image, none has a caption, one is named twice, a folder has both images and tars,
            or `metadata.jsonl` or a tar cannot be read.
    """
    sources = [str(source)] if isinstance(source, (str, Path)) else [str(entry) for entry in source]
    items: list[ImageItem] = []
    seen: set[Path] = set()
    for entry in sources:
        found = _from_source(entry, caption)
        if not found:
            raise UserError(f"{entry}: no images ({', '.join(EXTENSIONS)}) and no tars of them")
        paths = {item.path.resolve() for item in found}
        counts = Counter((item.path, item.name) for item in found)  # a tar is the path of many
        twice = seen & paths | {path for (path, _), count in counts.items() if count > 1}
        if twice:
            raise UserError(f"{min(twice)}: named twice among the images")
        seen |= paths
        if len(sources) > 1 and Path(entry).is_dir():  # else two folders' images could have one name
            found = [replace(item, name=f"{Path(entry).name}/{item.name}") for item in found]
        items += found
    where = ", ".join(sources)
    missing = [item.name for item in items if item.caption is None and item.error is None]
    if missing and all(item.caption is None for item in items):
        raise UserError(
            f"{where}: no image has a caption; give name.txt beside name.jpg, or {METADATA}, or one caption for all"
        )
    if missing:
        names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        logger.warning("%s: %d images have no caption and get the empty one: %s", where, len(missing), names)
    return items
