"""Pictures with captions from folders and tars, and a dataset of them for training without pre-encoding."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.files import MOST_IN_MEMBER, read_at_most, read_span
from ldm.images.captions import METADATA, beside, decode_caption, from_metadata
from ldm.images.decode import EXTENSIONS, FORMATS, UNREAD_EXTENSIONS, decode_image
from ldm.images.transforms import fit_square
from ldm.shards.tar import index_tar
from ldm.shards.urls import expand_urls, is_stream
from ldm.util import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageItem:
    """Where a picture is, and its caption: None if it has none. `error` says why the caption cannot be read."""

    name: str  # relative to the source
    path: Path
    span: tuple[int, int] | None = None  # offset and size in a tar; None for a whole file
    caption: str | None = None
    error: str | None = None

    def read(self) -> np.ndarray:
        """The picture, uint8 `(height, width, 3)`; `UserError` that names it if it or its caption is unreadable."""
        if self.error is not None:
            raise UserError(f"{self.name}: {self.error}")
        try:
            if self.span is None:
                data = read_at_most(self.path, MOST_IN_MEMBER)
            else:
                with self.path.open("rb") as file:
                    data = read_span(file.fileno(), *self.span, self.name)
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror or error}") from error
        return decode_image(bytes(data), self.name)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _extension(path: Path) -> str:
    return path.suffix.lower().lstrip(".")


def _from_file(path: Path, name: str, fixed: str | None) -> ImageItem:
    """A picture, whose caption is beside it unless it is `fixed`; of a kind that is not read, one with an error."""
    caption, error = (fixed, None) if fixed is not None else beside(path)
    if _extension(path) in UNREAD_EXTENSIONS:
        error = f"pictures of this kind are not read; convert it to one of {', '.join(FORMATS)}"
    return ImageItem(name, path, caption=caption, error=error)


def _from_folder(folder: Path, fixed: str | None) -> list[ImageItem]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    pictures = [path for path in files if _extension(path) in (*EXTENSIONS, *UNREAD_EXTENSIONS)]
    tars = [path for path in files if path.suffix == ".tar"]
    if pictures and tars:
        examples = " and ".join(str(paths[0].relative_to(folder)) for paths in (pictures, tars))
        raise UserError(f"{folder}: holds both pictures and tars, {examples}; put them into two folders")
    others = {path.suffix or path.name for path in set(files) - set(pictures)} - {".txt", ".json", ".jsonl", ".tar"}
    if others:
        logger.warning("%s: files of other kinds are left out: %s", folder, ", ".join(sorted(others)))
    if (folder / METADATA).is_file():
        captions = from_metadata(folder)
        unnamed = {path.relative_to(folder).as_posix() for path in pictures} - {name for name, _ in captions}
        if unnamed:
            logger.warning("%s: %d pictures, such as %s, are not in %s", folder, len(unnamed), min(unnamed), METADATA)
        named = ((name, caption if fixed is None else fixed) for name, caption in captions)
        return [ImageItem(name, folder / name, caption=caption) for name, caption in named]
    return [_from_file(path, path.relative_to(folder).as_posix(), fixed) for path in pictures]


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
                error = f"no picture ({', '.join(EXTENSIONS)}) among its members: {', '.join(sample.spans)}"
                items.append(ImageItem(f"{path.name}/{sample.key}", path, None, caption, error))
            else:
                name = f"{path.name}/{sample.key}.{extension}"
                items.append(ImageItem(name, path, sample.spans[extension], caption, error))
    return items


def _from_source(source: str, fixed: str | None) -> list[ImageItem]:
    path = Path(source)
    if path.is_file() and _extension(path) in (*EXTENSIONS, *UNREAD_EXTENSIONS):
        return [_from_file(path, path.name, fixed)]
    if path.is_dir():
        items = _from_folder(path, fixed)
        if items or not any(path.glob("[!.]*.tar")):
            return items
    items = []
    for url in expand_urls(source):
        if is_stream(url):
            raise UserError(f"{url}: pictures are read from folders and local tars; fetch it first")
        items += _from_tar(Path(url), fixed)
    return items


def find_images(source: str | Path | Sequence[str | Path], caption: str | None = None) -> list[ImageItem]:
    """Every picture of `source`, sorted by name within a folder; `caption`, if given, is the caption of them all.

    `source` is a folder of pictures (`metadata.jsonl` in it holds the captions, or `name.txt` beside each), a folder
    of tars, tars by path, glob or brace pattern, a picture, or a list of these. Pictures with no caption are told of,
    and get the empty one.

    Raises:
        UserError: there is no picture, none has a caption, one is named twice, a folder has both pictures and tars,
            or `metadata.jsonl` or a tar cannot be read.
    """
    sources = [str(source)] if isinstance(source, (str, Path)) else [str(entry) for entry in source]
    items: list[ImageItem] = []
    seen: set[Path] = set()
    for entry in sources:
        found = _from_source(entry, caption)
        if not found:
            raise UserError(f"{entry}: no pictures ({', '.join(EXTENSIONS)}) and no tars of them")
        paths = {item.path.resolve() for item in found}
        counts = Counter((item.path, item.name) for item in found)  # a tar is the path of many
        twice = seen & paths | {path for (path, _), count in counts.items() if count > 1}
        if twice:
            raise UserError(f"{min(twice)}: named twice among the pictures")
        seen |= paths
        if len(sources) > 1 and Path(entry).is_dir():  # else two folders' pictures could have one name
            found = [replace(item, name=f"{Path(entry).name}/{item.name}") for item in found]
        items += found
    where = ", ".join(sources)
    missing = [item.name for item in items if item.caption is None and item.error is None]
    if missing and all(item.caption is None for item in items):
        raise UserError(
            f"{where}: no picture has a caption; give name.txt beside name.jpg, or {METADATA}, or one caption for all"
        )
    if missing:
        names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        logger.warning("%s: %d pictures have no caption and get the empty one: %s", where, len(missing), names)
    return items


def digest_images(items: Iterable[ImageItem]) -> str:
    """The SHA-256, in hex, of what can be told of `items` without opening them: names, captions and sizes in bytes."""
    hashed = hashlib.sha256()
    for item in items:
        size = item.span[1] if item.span else (item.path.stat().st_size if item.path.is_file() else None)
        hashed.update(json.dumps([item.name, item.caption, item.error, size]).encode() + b"\n")
    return hashed.hexdigest()


class ImageCaptionDataset(Dataset):
    """Pictures and captions for training straight from pictures, cropped and scaled to `size`.

    An item is `{image_key: float32 (size, size, 3) in [-1, 1], caption_key: str}`; with `flip`, half are mirrored.
    `sample_keys` are the pictures' names.

    Raises:
        UserError: as `find_images`, or a picture of a kind, or with a caption, that cannot be read; on access, a
            picture that is broken, by name.
    """

    def __init__(
        self,
        root: str | Path | Sequence[str | Path],
        size: int,
        flip: bool = False,
        caption: str | None = None,
        image_key: str = "image",
        caption_key: str = "caption",
    ) -> None:
        self.items = find_images(root, caption)
        for item in self.items:
            if item.error is not None:
                raise UserError(f"{item.name}: {item.error}")
        self.sample_keys = [item.name for item in self.items]
        self.size = size
        self.flip = flip
        self.image_key = image_key
        self.caption_key = caption_key

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        picture = fit_square(torch.from_numpy(item.read()), self.size)  # 3 size size
        if self.flip and torch.rand(()) < 0.5:
            picture = picture.flip(-1)
        return {self.image_key: picture.permute(1, 2, 0).contiguous(), self.caption_key: item.caption or ""}
