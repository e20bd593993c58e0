"""ImageNet under CompVis' names, from folders of the user. Nothing is downloaded.

The default `data_root` is `$XDG_CACHE_HOME/autoencoders/data/ILSVRC2012_{train,validation}/data` (default `~/.cache`),
with one folder per class.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data.listed import ListedImages, folder_images, read_list, scaled_and_cropped
from ldm.data.parsed import read_yaml
from ldm.data.superresolution import PairedImages
from ldm.images.find import ImageItem
from ldm.util import UserError, nearest, refuse_if

logger = logging.getLogger(__name__)

_CONFIG_KEYS = ("size", "crop_size", "random_crop", "sub_indices")
_NUMBERS, _WORDS = "index_synset.yaml", "synset_human.txt"


def default_root(part: str) -> Path:
    """Return the folder of `part`, `train` or `validation`, in CompVis' code."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "autoencoders" / "data" / f"ILSVRC2012_{part}" / "data"


def class_numbers(root: Path, found: list[str]) -> dict[str, int]:
    """Return the number of each class, from `index_synset.yaml` beside `root`, else by the sorted names.

    The names are those of this part, and of the training part if it is beside it.
    """
    file = root.parent / _NUMBERS
    if file.is_file():
        listed = read_yaml(file, "numbers of classes")
        refuse_if(
            not isinstance(listed, dict) or not all(type(number) is int for number in listed),
            f"{file}: expected lines such as '0: n01440764'",
        )
        return {str(name): number for number, name in listed.items()}
    training = root.parent.parent / "ILSVRC2012_train" / root.name
    names = {path.name for path in training.iterdir() if path.is_dir()} if training.is_dir() else set()
    return {name: number for number, name in enumerate(sorted(names | set(found)))}


def class_words(root: Path) -> dict[str, str]:
    """Return the words for each class from `synset_human.txt` beside `root`, or nothing without this file."""
    file = root.parent / _WORDS
    if not file.is_file():
        return {}
    return dict(line.split(maxsplit=1) for line in read_list(file, "a class and its words") if " " in line)


def parse_indices(text: str) -> set[int]:
    """Return the class numbers in `text`, such as `"0-9, 15"`, with inclusive ranges."""
    numbers: set[int] = set()
    try:
        for part in str(text).split(","):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise UserError(f"sub_indices {text!r}: give class numbers such as '0-9, 15'") from error
    return numbers


class ImageNetBase(ListedImages):
    """Images in one folder per class. An item also has `relpath`, `synsets`, `class_label` (int) and `human_label`.

    Args:
        config: `size` and `crop_size` in pixels (without them, images are not changed), `random_crop`, `sub_indices`.
        process_images: apply `size` and `random_crop`.
        data_root: folder of the class folders.
    """

    PART, RANDOM_CROP = "train", False

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        process_images: bool = True,
        data_root: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        settings = {**(config or {}), **kwargs}
        for key in settings:
            if key not in _CONFIG_KEYS:
                raise UserError(f"unknown key {key!r} in the config of ImageNet{nearest(str(key), list(_CONFIG_KEYS))}")
        root = Path(data_root).expanduser() if data_root else default_root(self.PART)
        items = [item for item in folder_images(root, "ImageNet, one folder per class") if "/" in item.name]
        refuse_if(not items, f"{root}: has no class folders such as n01440764/")
        numbers = class_numbers(root, [_class_of(item) for item in items])
        unknown = [item for item in items if _class_of(item) not in numbers]
        if unknown:
            raise UserError(
                f"{unknown[0].path}: {_NUMBERS} has no number for the class {_class_of(unknown[0])!r}; add the "
                "class to that file, or move its folder away"
            )
        if settings.get("sub_indices"):
            wanted = parse_indices(settings["sub_indices"])
            items = [item for item in items if numbers[_class_of(item)] in wanted]
            if not items:
                raise UserError(f"sub_indices {settings['sub_indices']!r}: {root} has no image of these classes")
        random_crop = bool(settings.get("random_crop", self.RANDOM_CROP))
        size = settings.get("size") if process_images else None
        super().__init__(items, scaled_and_cropped(size, settings.get("crop_size"), random_crop), _labels(root, items))


class ImageNetTrain(ImageNetBase):
    """Training images with random crops."""

    PART, RANDOM_CROP = "train", True


class ImageNetValidation(ImageNetBase):
    """Validation images with centre crops."""

    PART, RANDOM_CROP = "validation", False


def _class_of(item: ImageItem) -> str:
    return item.name.partition("/")[0]


def _labels(root: Path, items: list[ImageItem]) -> dict[str, list[Any]]:
    synsets = [_class_of(item) for item in items]
    numbers, words = class_numbers(root, synsets), class_words(root)
    logger.info("%s: %d images of %d classes", root, len(items), len(set(synsets)))
    return {
        "relpath": [item.name for item in items],
        "synsets": synsets,
        "class_label": [numbers[name] for name in synsets],
        "human_label": [words.get(name, name) for name in synsets],
    }


class ImageNetSR(PairedImages):
    """Crops of ImageNet with low-resolution versions; see `PairedImages`. All images of the part are used."""

    PART = ImageNetTrain

    def __init__(self, data_root: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(self.PART(process_images=False, data_root=data_root), **kwargs)


class ImageNetSRTrain(ImageNetSR):
    """Training images."""


class ImageNetSRValidation(ImageNetSR):
    """Validation images."""

    PART = ImageNetValidation
