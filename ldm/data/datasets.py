"""Dataset of images with captions, for training without pre-encoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm.data.image_sources import find_images
from ldm.images.transforms import fit_square
from ldm.util import UserError


class ImageCaptionDataset(Dataset):
    """Dataset of images, cropped and scaled to `size`, and captions.

    An item is `{image_key: float32 (size, size, 3) in [-1, 1], caption_key: str}`. `flip` mirrors half of the images.
    `sample_keys` are the names of the images.

    Raises:
        UserError: as `find_images`, or an image of a kind, or with a caption, that cannot be read; on access, a
            image that is broken, by name.
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
        image = item.read(lambda pixels: fit_square(torch.from_numpy(pixels), self.size))  # 3 size size
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return {self.image_key: image.permute(1, 2, 0).contiguous(), self.caption_key: item.caption or ""}
