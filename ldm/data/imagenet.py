"""ImageNet under CompVis' names, from folders that the user has: nothing is downloaded.

A part is looked for in `$XDG_CACHE_HOME/autoencoders/data/ILSVRC2012_{train,validation}/data` (default `~/.cache`),
one folder per class, unless the config gives a `data_root`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm.data.listed import ListedImages, folder_images, read_list, scaled_and_cropped
from ldm.data.superresolution import PairedImages
from ldm.files import decode_text
from ldm.images.find import ImageItem
from ldm.util import UserError, nearest

logger = logging.getLogger(__name__)

_CONFIG_KEYS = ("size", "crop_size", "random_crop", "sub_indices")
_NUMBERS, _WORDS = "index_synset.yaml", "synset_human.txt"


def default_root(part: str) -> Path:
    """The folder in which CompVis' code keeps `part`, `train` or `validation`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "autoencoders" / "data" / f"ILSVRC2012_{part}" / "data"


def class_numbers(root: Path, found: list[str]) -> dict[str, int]:
    """The number of each class: of `index_synset.yaml` beside `root`, else the place among the sorted names.

    The names are those of the part to train on, where it lies beside this one, and of this part.
    """
    file = root.parent / _NUMBERS
    if file.is_file():
        listed = yaml.safe_load(decode_text(file.read_bytes()))
        if not isinstance(listed, dict) or not all(type(number) is int for number in listed):
            raise UserError(f"{file}: expected lines such as '0: n01440764'")
        return {str(name): number for number, name in listed.items()}
    training = root.parent.parent / "ILSVRC2012_train" / root.name
    names = {path.name for path in training.iterdir() if path.is_dir()} if training.is_dir() else set()
    return {name: number for number, name in enumerate(sorted(names | set(found)))}


def class_words(root: Path) -> dict[str, str]:
    """The words for each class, of `synset_human.txt` beside `root`; none where there is no such file."""
    file = root.parent / _WORDS
    if not file.is_file():
        return {}
    return dict(line.split(maxsplit=1) for line in read_list(file, "a class and its words") if " " in line)


def parse_indices(text: str) -> set[int]:
    """The class numbers that `text` lists, such as `"0-9, 15"`; both ends of a range are included."""
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
        config: `size` and `crop_size` in pixels (none: images stay as they are), `random_crop`, `sub_indices`.
        process_images: whether `size` and `random_crop` are followed.
        data_root: the folder of the classes' folders.
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
        if not items:
            raise UserError(f"{root}: no folder per class in it, such as n01440764/")
        numbers = class_numbers(root, [_class_of(item) for item in items])
        unknown = [item for item in items if _class_of(item) not in numbers]
        if unknown:
            raise UserError(f"{unknown[0].path}: {_NUMBERS} does not number the class {_class_of(unknown[0])!r}")
        if settings.get("sub_indices"):
            wanted = parse_indices(settings["sub_indices"])
            items = [item for item in items if numbers[_class_of(item)] in wanted]
            if not items:
                raise UserError(f"sub_indices {settings['sub_indices']!r}: {root} has no image of these classes")
        random_crop = bool(settings.get("random_crop", self.RANDOM_CROP))
        size = settings.get("size") if process_images else None
        super().__init__(items, scaled_and_cropped(size, settings.get("crop_size"), random_crop), _labels(root, items))


class ImageNetTrain(ImageNetBase):
    """The part to train on, cropped at random."""

    PART, RANDOM_CROP = "train", True


class ImageNetValidation(ImageNetBase):
    """The part to validate on, cropped in the middle."""

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
    """Crops of ImageNet with low-resolution versions; see `PairedImages`. All images of the part are taken."""

    PART = ImageNetTrain

    def __init__(self, data_root: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(self.PART(process_images=False, data_root=data_root), **kwargs)


class ImageNetSRTrain(ImageNetSR):
    """The part to train on."""


class ImageNetSRValidation(ImageNetSR):
    """The part to validate on."""

    PART = ImageNetValidation
