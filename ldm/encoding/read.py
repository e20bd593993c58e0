"""Images on their way to the encoder: decoded and fitted in worker processes, and put together by size."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.images.buckets import Size, nearest_size
from ldm.images.find import ImageItem
from ldm.images.transforms import centre_crop, fit
from ldm.util import UserError

Numbered = tuple[int, ImageItem]  # an image and its number in the whole input


@dataclass
class FittedImage:
    """An image that was read."""

    number: int
    item: ImageItem
    pixels: np.ndarray  # uint8 (3, H, W), fitted
    height: int  # of the original
    width: int

    @property
    def size(self) -> Size:
        return self.pixels.shape[1:]

    @property
    def caption(self) -> str:
        return self.item.caption or ""

    @property
    def key(self) -> str:
        return sample_key(self.number, self.item.name)

    def origin(self, flip: bool) -> dict[str, Any]:
        """Return the sample's `json`: where it comes from, and what was made of it."""
        return {
            "source": self.item.name,
            "height": self.height,
            "width": self.width,
            "crop": centre_crop(self.height, self.width, *self.size),  # top, left, height, width in the original
            "size": self.size,  # height, width
            "flip": flip,
        }


@dataclass
class Unreadable:
    """An image that could not be read, and why."""

    item: ImageItem
    reason: str


def sample_key(number: int, name: str) -> str:
    """A key that is unique, sorts by number, and has no dot, at which WebDataset would cut it."""
    return f"{number:06d}_" + re.sub(r"[^A-Za-z0-9-]+", "_", PurePosixPath(name).stem)[:60]


def default_workers(encoders: int = 1) -> int:
    """Decoding processes where nothing is said, for each of so many `encoders` on this machine.

    Up to sixteen: each decodes and fits a few photographs of 12 megapixels a second. A core is left for the encoder.
    """
    return max(0, min(16, (os.cpu_count() or 1) // encoders - 1))


class _Fitted(Dataset):
    """What becomes of a numbered item, fitted to the nearest of `sizes`."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes = sizes

    def __getitem__(self, entry: Numbered) -> FittedImage | Unreadable:
        number, item = entry
        try:
            return item.read(lambda pixels: self._fit(pixels, number, item))
        except UserError as error:
            return Unreadable(item, str(error))

    def _fit(self, pixels: np.ndarray, number: int, item: ImageItem) -> FittedImage:
        height, width = pixels.shape[:2]
        fitted = fit(torch.from_numpy(pixels), *nearest_size(height, width, self.sizes))
        # numpy, since torch would keep a file open for each image on its way from a worker
        return FittedImage(number, item, fitted.numpy(), height, width)


def read_images(
    entries: Iterable[Numbered], sizes: Sequence[Size], workers: int, ahead: int
) -> Iterator[FittedImage | Unreadable]:
    """What becomes of each of `entries`, in order; `workers` processes read at least `ahead` before they are asked."""
    # The items go to the workers one by one: a list that they share is copied as soon as they count references in it.
    options = {"prefetch_factor": max(2, -(-ahead // workers))} if workers else {}
    loader = DataLoader(_Fitted(sizes), batch_size=None, sampler=entries, num_workers=workers, **options)
    return iter(loader)


def batches(images: Iterable[FittedImage], batch_size: int, ahead: int) -> Iterator[list[tuple[int, FittedImage]]]:
    """Images of one size, `batch_size` together, each with its place in `images`.

    None waits for more of its size until `ahead` others have gone by: then fewer go together.
    """
    waiting: dict[Size, list[tuple[int, FittedImage]]] = {}  # in the order of their first ones
    for place, image in enumerate(images):
        group = waiting.setdefault(image.size, [])
        group.append((place, image))
        if len(group) == batch_size:
            yield waiting.pop(image.size)
        while waiting and place - next(iter(waiting.values()))[0][0] >= ahead:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
