"""Reading of images for the encoder: decoded and fitted in worker processes, then batched by size."""

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

from ldm.identity import Replaced
from ldm.images.buckets import Size, nearest_size
from ldm.images.find import ImageItem
from ldm.images.transforms import centre_crop, fit
from ldm.util import UserError

Numbered = tuple[int, ImageItem]  # the number of an image in the input, and the image


@dataclass
class FittedImage:
    """Decoded image, resized and cropped."""

    number: int
    item: ImageItem
    pixels: np.ndarray  # uint8 (3, H, W)
    height: int  # of the original image
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
        """Return the sample's `json`: the source of the image, its size, crop and flip."""
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
    """Image that cannot be read, and the reason. `is_fatal`: its tar was replaced, so no further image can be read."""

    item: ImageItem
    reason: str
    is_fatal: bool = False


def sample_key(number: int, name: str) -> str:
    """Return a unique key that sorts by number. It has no dot, because WebDataset ends the key at the first dot."""
    return f"{number:06d}_" + re.sub(r"[^A-Za-z0-9-]+", "_", PurePosixPath(name).stem)[:60]


def default_workers(encoders: int = 1) -> int:
    """Return the default number of decoding processes for each of the `encoders` processes of this machine.

    One core stays free for the encoder. The maximum is 16: one process reads several 12-megapixel images per second.
    """
    return max(0, min(16, (os.cpu_count() or 1) // encoders - 1))


class _Fitted(Dataset):
    """Data set that reads an image and fits it to the nearest of `sizes`."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.sizes = sizes

    def __getitem__(self, entry: Numbered) -> FittedImage | Unreadable:
        number, item = entry
        try:
            return item.read(lambda pixels: self._fit(pixels, number, item))
        except UserError as error:
            return Unreadable(item, str(error), isinstance(error, Replaced))

    def _fit(self, pixels: np.ndarray, number: int, item: ImageItem) -> FittedImage:
        height, width = pixels.shape[:2]
        fitted = fit(torch.from_numpy(pixels), *nearest_size(height, width, self.sizes))
        # A numpy array, because a worker sends each torch tensor through an open file.
        return FittedImage(number, item, fitted.numpy(), height, width)


def read_images(
    entries: Iterable[Numbered], sizes: Sequence[Size], workers: int, ahead: int
) -> Iterator[FittedImage | Unreadable]:
    """Yield the result for each of `entries`, in order. `workers` processes prefetch at least `ahead` images."""
    # Items are sent one by one. A list shared with the workers would be copied by their reference counting.
    options = {"prefetch_factor": max(2, -(-ahead // workers))} if workers else {}
    loader = DataLoader(_Fitted(sizes), batch_size=None, sampler=entries, num_workers=workers, **options)
    return iter(loader)


def batches(images: Iterable[FittedImage], batch_size: int, ahead: int) -> Iterator[list[tuple[int, FittedImage]]]:
    """Yield batches of up to `batch_size` images of one size, each image with its place in `images`.

    A smaller batch is yielded once `ahead` images have been read after its first.
    """
    waiting: dict[Size, list[tuple[int, FittedImage]]] = {}  # ordered by the place of the first image
    for place, image in enumerate(images):
        group = waiting.setdefault(image.size, [])
        group.append((place, image))
        if len(group) == batch_size:
            yield waiting.pop(image.size)
        while waiting and place - next(iter(waiting.values()))[0][0] >= ahead:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
