"""Dataset of image pairs with an instruction, in the layout of InstructPix2Pix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.listed import existing_folder, naming, read_image, to_minus_one_one
from ldm.data.parsed import read_json
from ldm.images.augmentations import RandomHorizontalFlip
from ldm.images.find import ImageItem
from ldm.images.metadata import relative_name
from ldm.images.pixels import crop, random_below, resize
from ldm.util import UserError, check_choice, refuse_if

_SPLITS = ("train", "val", "test")


class EditDataset(Dataset):
    """Dataset of image pairs and the instruction that edits the first image into the second.

    An item is `{"edited": (3, c, c), "edit": {"c_concat": (3, c, c), "c_crossattn": instruction}}`, images in [-1, 1].
    Both images have the same size, crop and flip.

    Args:
        path: folder with `seeds.json`, a list of `[name, [seed, ...]]`. Its folder `name` has `prompt.json` with the
            key `edit`, and `SEED_0.jpg` and `SEED_1.jpg` for each seed.
        split: `train`, `val` or `test`.
        splits: shares of these three, with the sum 1.
        min_resize_res, max_resize_res: range of the side in pixels to which images are scaled.
        crop_res: side in pixels of the random crop.
        flip_prob: probability of a flip.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        splits: Sequence[float] = (0.9, 0.05, 0.05),
        min_resize_res: int = 256,
        max_resize_res: int = 256,
        crop_res: int = 256,
        flip_prob: float = 0.0,
    ) -> None:
        check_choice("split", split, tuple(_SPLITS))
        refuse_if(
            len(splits) != len(_SPLITS) or not math.isclose(sum(splits), 1),
            f"splits {list(splits)}: give three shares that sum to 1",
        )
        refuse_if(
            not crop_res <= min_resize_res <= max_resize_res,
            f"crop_res {crop_res}, min_resize_res {min_resize_res}, max_resize_res {max_resize_res}: "
            "must be in ascending order",
        )
        self.path = existing_folder(path, "seeds.json and the folders of image pairs")
        seeds = self._read_seeds()
        first = sum(splits[: _SPLITS.index(split)])
        last = first + splits[_SPLITS.index(split)]
        self.seeds = seeds[math.floor(first * len(seeds)) : math.floor(last * len(seeds))]
        if not self.seeds:
            raise UserError(f"{self.path / 'seeds.json'}: with {len(seeds)} entries, the split {split} is empty")
        self.sample_keys = [name for name, _ in self.seeds]
        self.resize_res = (min_resize_res, max_resize_res)
        self.crop_res = crop_res
        self.flip = RandomHorizontalFlip(flip_prob)

    def _read_seeds(self) -> list[tuple[str, list]]:
        """Return the folder of each instruction, relative to `path`, and the seeds of its pairs."""
        found = read_json(self.path / "seeds.json", "seeds")
        for entry in found if isinstance(found, list) else [None]:
            refuse_if(
                not (isinstance(entry, list) and list(map(type, entry)) == [str, list] and entry[1]),
                f"{self.path / 'seeds.json'}: expected a list of [name, [seed, ...]]",
            )
        return [(relative_name(name, self.path, "seeds.json: a pair"), own) for name, own in found]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, seeds = self.seeds[index]
        folder = self.path / name
        seed = str(seeds[random_below(len(seeds))])
        described = read_json(folder / "prompt.json", "prompt")
        prompt = described.get("edit") if isinstance(described, dict) else None
        refuse_if(not isinstance(prompt, str), f"{folder / 'prompt.json'}: has no instruction 'edit'")
        low, high = self.resize_res
        side = low + random_below(high - low + 1)
        pair = torch.cat([self._load(f"{name}/{seed}_{which}.jpg", side) for which in (0, 1)])  # 6 side side
        room = pair.shape[-1] - self.crop_res + 1
        pair = self.flip(crop(pair, random_below(room), random_below(room), self.crop_res, self.crop_res))
        before, after = pair.chunk(2)
        return {"edited": after, "edit": {"c_concat": before, "c_crossattn": prompt}}

    def _load(self, name: str, side: int) -> Tensor:
        """Return the image `name`, scaled to a square, float32 (3, side, side) in [-1, 1]."""
        with naming(name):
            name = relative_name(name, self.path, "seeds.json: an image")
            item = ImageItem(name, self.path / name, caption="")
            image = read_image(item, lambda image: resize(image, side, side, "lanczos"))
        return to_minus_one_one(image).permute(2, 0, 1)
