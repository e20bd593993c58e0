"""Datasets of images from a list or a folder, the base of the datasets in public configs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.image_sources import find_images
from ldm.files import read_at_most
from ldm.images.augmentations import CenterCrop, Compose, RandomCrop, Resize
from ldm.images.captions import spelled
from ldm.images.find import ImageItem
from ldm.images.metadata import relative_name
from ldm.text_files import decode_text
from ldm.util import UserError, refuse_if

T = TypeVar("T")

_MOST_IN_LIST = 1 << 30  # size limit of a list in bytes
_MOST_IN_ARRAY = 1 << 30


def existing_folder(path: str | Path, what: str) -> Path:
    """Return `path` as an existing folder. `what` describes its data for the message.

    Raises:
        UserError: the folder does not exist. The message has the absolute path.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder.absolute())!r}: put {what} there, or set data_root to their folder")
    return folder


def read_list(path: str | Path, what: str) -> list[str]:
    """Return the non-empty lines of a text file. `what` describes them for messages.

    Raises:
        UserError: the file is missing, empty or not UTF-8. The message has the absolute path.
    """
    file = Path(path).expanduser()
    try:
        text = decode_text(read_at_most(file, _MOST_IN_LIST))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file: {error}") from error
    except OSError as error:
        raise UserError(f"no list {str(file.absolute())!r} ({error.strerror}): give {what}, one per line") from error
    lines = [line.strip() for line in re.split("[\r\n]", text) if line.strip()]  # `splitlines` also splits at "\u2028"
    refuse_if(not lines, f"{file}: is empty; give {what}, one per line")
    return lines


def listed_images(root: str | Path, names: Iterable[str], what: str) -> list[ImageItem]:
    """Return the items of the images `names` in the folder `root`, with the empty caption.

    Raises:
        UserError: a name is outside the folder; the folder or the first image is missing.
    """
    folder = existing_folder(root, what)
    inside = (relative_name(name, folder, "an image of the list") for name in names)
    items = [ImageItem(name, folder / name, caption="") for name in inside]
    if not spelled(items[0].path).is_file():
        raise UserError(f"{items[0].path.absolute()}: no such image, although it is the first of the list")
    return items


def folder_images(root: str | Path, what: str) -> list[ImageItem]:
    """Return all images in `root` and its subfolders, sorted, with the empty caption."""
    return find_images(existing_folder(root, what), caption="")


def read_image(item: ImageItem, then: Callable[[Image.Image], T] = lambda image: image) -> T:
    """Return `then(image)` of the RGB image of `item`, usually a smaller image; see `ImageItem.read`.

    `item` is an image file or a `.npy`, uint8 (3, H, W), (1, 3, H, W) or (H, W, 3).
    """
    if item.span is None:
        item = replace(item, path=spelled(item.path))
    if item.path.suffix.lower() != ".npy":
        return item.read(lambda pixels: then(Image.fromarray(pixels)))
    try:
        array = np.load(io.BytesIO(read_at_most(item.path, _MOST_IN_ARRAY)), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{item.name}: {getattr(error, 'strerror', None) or error}") from error
    given = f"{array.dtype} {array.shape}"
    array = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    refuse_if(
        array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3,
        f"{item.name}: {given}, not uint8 (3, height, width)",
    )
    return then(Image.fromarray(np.ascontiguousarray(array)))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Add the name of an image to the start of `UserError`s."""
    try:
        yield
    except UserError as error:
        if name in str(error):
            raise
        raise UserError(f"{name}: {error}") from error


def to_minus_one_one(image: Image.Image | np.ndarray) -> torch.Tensor:
    """Convert a uint8 RGB image to float32 (H, W, 3) in [-1, 1], the layout of batches in CompVis' models."""
    return torch.from_numpy(np.array(image)).float() / 127.5 - 1


def scaled_and_cropped(size: int | None, crop_size: int | None = None, random_crop: bool = False) -> Compose:
    """Return a transform that scales the smaller side to `size` and crops a square of `crop_size` (default: `size`).

    With `size` None, images are not scaled. With both None, they are not changed.

    Raises:
        UserError: `crop_size` exceeds `size`.
    """
    crop = RandomCrop if random_crop else CenterCrop
    if not size:
        return Compose([crop(crop_size)] if crop_size else [])
    refuse_if(crop_size and crop_size > size, f"crop_size {crop_size}: must be at most size, {size}")
    return Compose([Resize(size), crop(crop_size or size)])


class ListedImages(Dataset):
    """Dataset of images with labels.

    An item is `{"image": float32 (h, w, 3) in [-1, 1], "file_path_": str, label: value, ...}`.

    Args:
        items: the images.
        transform: function from PIL image to PIL image.
        labels: one value per image, by name.
    """

    def __init__(
        self,
        items: Sequence[ImageItem],
        transform: Callable[[Image.Image], Image.Image],
        labels: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.items = list(items)
        self.sample_keys = [item.name for item in self.items]
        self.transform = transform
        self.labels = dict(labels or {})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        with naming(item.name):
            image = read_image(item, self.transform)
        return {"image": to_minus_one_one(image), **self.labels_of(index)}

    def labels_of(self, index: int) -> dict[str, Any]:
        """Return the entries of an item except for the image."""
        labels = {name: values[index] for name, values in self.labels.items()}
        return {"file_path_": str(self.items[index].path), **labels}
