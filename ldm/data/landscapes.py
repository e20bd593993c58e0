"""Landscapes with segmentations under the names of CompVis' configs. The user provides lists and files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.listed import existing_folder, listed_images, naming, read_image, read_list, to_minus_one_one
from ldm.files import MOST_IN_MEMBER, read_at_most
from ldm.images.captions import spelled
from ldm.images.find import ImageItem
from ldm.images.pixels import crop, image_size, random_below, resize
from ldm.util import UserError, refuse_if

LABELS = 182  # number of labels in COCO-Stuff


class SegmentedImages(Dataset):
    """Dataset of images and the label of each pixel.

    An item is `{"image": float32 (c, c, 3) in [-1, 1], "segmentation": one-hot (c, c, 182), "file_path_": str}`.

    Args:
        size: smaller side in pixels to which images are scaled.
        crop_size: side in pixels of the square crop.
        segmentation_to_float32: one-hot values as float32, else int64.
        txt_file: one image per line, relative to `data_root`.
        data_root: folder of the images.
        segmentation_root: folder of grey images `NAME.png` whose values are the labels.
        random_crop: random crop, else centre crop.
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
        refuse_if(crop_size > size, f"crop_size {crop_size}: must be at most size, {size}")
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
        refuse_if(labels.size != image.size, f"{name}: has {labels.size} pixels, but the image has {image.size}")
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
    """Return the grey image of labels. Raise `UserError` if it is missing, in colour, or has an invalid label."""
    with naming(item.name):
        try:
            with Image.open(io.BytesIO(read_at_most(spelled(item.path), MOST_IN_MEMBER)), formats=("PNG",)) as opened:
                opened.load()
                labels = opened if opened.mode in ("L", "P") else None
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{item.path}: {getattr(error, 'strerror', None) or error}") from error
        refuse_if(labels is None, f"{item.path}: not a grey or indexed PNG of labels")
        values = np.asarray(labels)
        if values.max() >= LABELS:
            raise UserError(
                f"{item.path}: label {values.max()} is not below {LABELS}; convert it to the labels of COCO-Stuff"
            )
        return Image.fromarray(values)


class RFWTrain(SegmentedImages):
    """Training landscapes with random crops."""

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
    """Validation landscapes with centre crops."""

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
