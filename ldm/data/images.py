"""Pictures with captions from folders and tars, and a dataset of them for training without pre-encoding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.captions import METADATA, beside, decode_caption, from_metadata
from ldm.data.decode import EXTENSIONS, decode_image
from ldm.data.tar import index_tar, read_span
from ldm.data.transforms import fit_square
from ldm.data.urls import expand_urls, is_stream
from ldm.util import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
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
            with self.path.open("rb") as file:
                data = file.read() if self.span is None else read_span(file.fileno(), *self.span, self.name)
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror or error}") from error
        return decode_image(bytes(data), self.name)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _from_folder(folder: Path, fixed: str | None) -> list[ImageItem]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path.relative_to(folder))]
    pictures = [path for path in files if path.suffix.lower().lstrip(".") in EXTENSIONS]
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
    items = []
    for path in pictures:
        caption, error = (fixed, None) if fixed is not None else beside(path)
        items.append(ImageItem(path.relative_to(folder).as_posix(), path, caption=caption, error=error))
    return items


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


def find_images(source: str | Path | Sequence[str | Path], caption: str | None = None) -> list[ImageItem]:
    """Every picture of `source`, sorted by name within a folder; `caption`, if given, is the caption of them all.

    `source` is a folder of pictures (`metadata.jsonl` in it holds the captions, or `name.txt` beside each), a folder
    of tars, or tars by path, glob, brace pattern or list. Pictures with no caption are told of, and get the empty one.

    Raises:
        UserError: there is no picture, none has a caption, or `metadata.jsonl` or a tar cannot be read.
    """
    items: list[ImageItem] = []
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        items = _from_folder(Path(source), caption)
        if not items and not any(Path(source).glob("[!.]*.tar")):
            raise UserError(f"{source}: no pictures ({', '.join(EXTENSIONS)}) and no tars in this folder")
    if not items:
        for url in expand_urls(source):
            if is_stream(url):
                raise UserError(f"{url}: pictures are read from folders and local tars; fetch it first")
            items += _from_tar(Path(url), caption)
    if not items:
        raise UserError(f"{source}: no pictures ({', '.join(EXTENSIONS)})")
    missing = [item.name for item in items if item.caption is None and item.error is None]
    if len(missing) == len(items):
        raise UserError(
            f"{source}: no picture has a caption; give name.txt beside name.jpg, or {METADATA}, or one caption for all"
        )
    if missing:
        names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        logger.warning("%s: %d pictures have no caption and get the empty one: %s", source, len(missing), names)
    return items


class ImageCaptionDataset(Dataset):
    """Pictures and captions for training straight from pictures, cropped and scaled to `size`.

    An item is `{image_key: float32 (size, size, 3) in [-1, 1], caption_key: str}`; with `flip`, half are mirrored.

    Raises:
        UserError: as `find_images`; on access, a picture that cannot be read, by name.
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
