"""Reading of images for the encoder: decoded and fitted in worker processes, then batched by size."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.identity import Replaced
from ldm.images.buckets import Size, nearest_size
from ldm.images.find import ImageItem
from ldm.images.transforms import Crop, centre_crop, fit
from ldm.shards.sample import CROP, VARIANTS, sizes_of
from ldm.util import UserError

Numbered = tuple[int, ImageItem]  # the number of an image in the input, and the image
Reader = Callable[[int, ImageItem], "FittedImage"]
Crops = Callable[[int, int, Size], Sequence[Crop]]  # from the height and width of an image, and the size to fit


@dataclass
class FittedImage:
    """Decoded image, resized and cropped."""

    number: int
    item: ImageItem
    pixels: np.ndarray  # uint8 (3, H, W)
    height: int  # of the original image
    width: int
    crop: Crop  # in the original image
    others: dict[str, np.ndarray] = field(default_factory=dict)  # by name, such as masks, uint8 (n, H, W)
    variants: Sequence[FittedImage] = ()  # further views of the same image

    @property
    def views(self) -> list[FittedImage]:
        """Return the image itself, and its variants."""
        return [self, *self.variants]

    @property
    def size(self) -> Size:
        return self.pixels.shape[1:]

    @property
    def captions(self) -> list[str]:
        return (self.item.caption or "").split("\n")

    @property
    def key(self) -> str:
        return sample_key(self.number, self.item.name)

    def origin(self, flip: bool) -> dict[str, Any]:
        """Return the sample's `json`: the source of the image, its size, crop and flip, and the crops of variants.

        `crop` refers to the original image. With `flip`, the entries of `SIZES` refer to the mirror image.
        """
        top, left, rows, columns = self.crop
        seen = (top, self.width - left - columns, rows, columns) if flip else self.crop
        described = {
            "source": self.item.name,
            "height": self.height,
            "width": self.width,
            "crop": self.crop,  # top, left, height, width in the original
            "size": self.size,  # height, width
            "flip": flip,
            **sizes_of((self.height, self.width), seen, self.size),
        }
        others = [{"crop": view.crop, CROP: view.origin(flip)[CROP]} for view in self.variants]
        return described | ({VARIANTS: others} if others else {})


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


def _centre(height: int, width: int, size: Size) -> list[Crop]:
    return [centre_crop(height, width, *size)]


def read_fitted(number: int, item: ImageItem, sizes: Sequence[Size], crops: Crops = _centre) -> FittedImage:
    """Return the image `item`, fitted to the nearest of `sizes`. It has a variant for each of `crops` after the first.

    Raises:
        UserError: the image cannot be read.
    """

    def fitted(pixels: np.ndarray) -> FittedImage:
        height, width = pixels.shape[:2]
        size = nearest_size(height, width, sizes)
        views = []
        for crop in crops(height, width, size):
            result = fit(torch.from_numpy(pixels), *size, crop)
            # A numpy array, because a worker sends each torch tensor through an open file.
            views.append(FittedImage(number, item, result.numpy(), height, width, crop))
        return replace(views[0], variants=views[1:])

    return item.read(fitted)


class _Read(Dataset):
    """Data set of the images that `read` returns."""

    def __init__(self, read: Reader) -> None:
        self.read = read

    def __getitem__(self, entry: Numbered) -> FittedImage | Unreadable:
        try:
            return self.read(*entry)
        except UserError as error:
            return Unreadable(entry[1], str(error), isinstance(error, Replaced))


def read_images(
    entries: Iterable[Numbered], read: Reader, workers: int, ahead: int
) -> Iterator[FittedImage | Unreadable]:
    """Yield what `read` returns for each of `entries`, in order. `workers` processes prefetch at least `ahead`."""
    # Items are sent one by one. A list shared with the workers would be copied by their reference counting.
    options = {"prefetch_factor": max(2, -(-ahead // workers))} if workers else {}
    loader = DataLoader(_Read(read), batch_size=None, sampler=entries, num_workers=workers, **options)
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
