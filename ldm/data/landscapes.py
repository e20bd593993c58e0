"""Landscapes with segmentations, under the names of CompVis' configs; lists and files are the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.listed import existing_folder, listed_images, naming, read_image, read_list, to_minus_one_one
from ldm.images.find import ImageItem
from ldm.images.pixels import crop, image_size, random_below, resize
from ldm.util import UserError

LABELS = 182  # of COCO-Stuff, whose segmentations they are


class SegmentedImages(Dataset):
    """Images and the label of each pixel.

    An item is `{"image": float32 (c, c, 3) in [-1, 1], "segmentation": one-hot (c, c, 182), "file_path_": str}`.

    Args:
        size: pixels of the smaller side that images are scaled to.
        crop_size: pixels of the square that is cut out.
        segmentation_to_float32: the one-hot values as float32, else as int64.
        txt_file: one image per line, relative to `data_root`.
        data_root: the folder of the images.
        segmentation_root: the folder of grey images `NAME.png` whose values are labels.
        random_crop: cut anywhere, else in the middle.
    """

    def __init__(
        self,
        size: int,
        crop_size: int,
        segmentation_to_float32: bool,
        txt_file: str | Path,
        data_root: str | Path,
        segmentation_root: str | Path,
        random_crop: bool,
    ) -> None:
        if crop_size > size:
            raise UserError(f"crop_size {crop_size}: give at most the size, {size}")
        self.items = listed_images(data_root, read_list(txt_file, "the images"), "the landscapes")
        self.segmentations = existing_folder(segmentation_root, "the segmentations")
        self.sample_keys = [item.name for item in self.items]
        self.size, self.crop_size, self.random_crop = size, crop_size, random_crop
        self.dtype = torch.float32 if segmentation_to_float32 else torch.int64

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        image = read_image(item)
        name = str(Path(item.name).with_suffix(".png"))
        labels = read_labels(ImageItem(name, self.segmentations / name, caption=""))
        if labels.size != image.size:
            raise UserError(f"{name}: {labels.size} pixels, but the image has {image.size}")
        scale = self.size / min(image.size)
        height, width = (max(self.size, round(side * scale)) for side in image_size(image))
        room = (height - self.crop_size, width - self.crop_size)
        top, left = (random_below(free + 1) if self.random_crop else free // 2 for free in room)
        image, labels = (
            crop(resize(part, height, width, way), top, left, self.crop_size, self.crop_size)
            for part, way in ((image, "bilinear"), (labels, "nearest"))
        )
        one_hot = F.one_hot(torch.from_numpy(np.array(labels)).long(), LABELS).to(self.dtype)  # c c 182
        return {"image": to_minus_one_one(image), "segmentation": one_hot, "file_path_": str(item.path)}


def read_labels(item: ImageItem) -> Image.Image:
    """The grey image of labels; `UserError` that names it if it is missing, in colour, or has a label out of range."""
    with naming(item.name):
        try:
            with Image.open(item.path, formats=("PNG",)) as opened:
                opened.load()
                labels = opened if opened.mode in ("L", "P") else None
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{item.path}: {getattr(error, 'strerror', None) or error}") from error
        if labels is None:
            raise UserError(f"{item.path}: not a grey or indexed PNG of labels")
        values = np.asarray(labels)
        if values.max() >= LABELS:
            raise UserError(f"{item.path}: label {values.max()} is not below {LABELS}")
        return Image.fromarray(values)


class RFWTrain(SegmentedImages):
    """The landscapes to train on, cropped at random."""

    def __init__(
        self,
        size: int,
        crop_size: int,
        segmentation_to_float32: bool = False,
        txt_file: str | Path = "data/rfw/train.txt",
        data_root: str | Path = "data/rfw/images",
        segmentation_root: str | Path = "data/rfw/segmentations",
    ) -> None:
        super().__init__(size, crop_size, segmentation_to_float32, txt_file, data_root, segmentation_root, True)


class RFWValidation(SegmentedImages):
    """The landscapes to validate on, cropped in the middle."""

    def __init__(
        self,
        size: int,
        crop_size: int,
        segmentation_to_float32: bool = False,
        txt_file: str | Path = "data/rfw/validation.txt",
        data_root: str | Path = "data/rfw/images",
        segmentation_root: str | Path = "data/rfw/segmentations",
    ) -> None:
        super().__init__(size, crop_size, segmentation_to_float32, txt_file, data_root, segmentation_root, False)
