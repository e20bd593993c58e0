"""Datasets of justinpinkney's configs: folders of images with captions, and captions only. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.image_sources import find_images
from ldm.data.listed import existing_folder, folder_images, naming, read_image, read_list, to_minus_one_one
from ldm.data.parsed import read_json
from ldm.images.augmentations import build_transform
from ldm.images.find import ImageItem
from ldm.images.metadata import from_metadata, metadata_file, relative_name
from ldm.images.pixels import random_below
from ldm.util import UserError, instantiate_from_config, refuse_if

_TEXT_COLUMN = "text"


def _listed(file: Path, folder: Path, text_key: str | None = None) -> list[ImageItem]:
    """Return the images of `folder` that have a caption in `file`; see `from_metadata`.

    Raises:
        UserError: the file is missing, invalid or of another type, or names a file outside its folder.
    """
    if not file.is_file():
        raise UserError(f"no captions {str(file.absolute())!r}: no such file")
    entries = from_metadata(file, folder=folder, text_key=text_key)
    refuse_if(not entries, f"{file}: has no captions")
    return [ImageItem(entry.name, folder / entry.name, caption=entry.caption) for entry in entries]


class FolderData(Dataset):
    """Images in a folder. An item is `{"image": float32 (h, w, 3) in [-1, 1], "txt": caption}`.

    Args:
        root_dir: the folder.
        caption_file: captions by file name, relative to `root_dir`; see `from_metadata`. Only these images are read.
        image_transforms: transforms of the PIL image, each by `target` and `params`.
        ext: extension of the images, or a list of them; only without a `caption_file`.
        default_caption: caption of images without one.
        postprocess: `target` and `params` of a function from item to item.
        return_paths: add the item's `path`.
    """

    def __init__(
        self,
        root_dir: str | Path,
        caption_file: str | Path | None = None,
        image_transforms: Sequence[Any] | None = None,
        ext: str | Sequence[str] = "jpg",
        default_caption: str = "",
        postprocess: Any = None,
        return_paths: bool = False,
    ) -> None:
        self.root_dir = existing_folder(root_dir, "the images")
        if caption_file is not None:
            items = _listed(Path(caption_file).expanduser(), self.root_dir)
        else:
            items = _with_extensions(self.root_dir, ext)
        self.items = [replace(item, caption=item.caption or default_caption) for item in items]
        self.sample_keys = [item.name for item in self.items]
        self.transform = build_transform(image_transforms)
        self.postprocess: Callable[[dict], dict] | None = _built(postprocess)
        self.return_paths = return_paths

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        sample = {"image": self.load(item), "txt": item.caption}
        if self.return_paths:
            sample["path"] = str(item.path)
        return self.postprocess(sample) if self.postprocess else sample

    def load(self, item: ImageItem) -> Tensor:
        """Return the image of `item` after the transforms, (h, w, 3) in [-1, 1]."""
        with naming(item.name):
            return as_model_input(read_image(item, self.transform))


def as_model_input(image: Image.Image | Tensor) -> Tensor:
    """Convert the result of transforms, a PIL image or tensor (3, h, w) in [0, 1], to float32 (h, w, 3) in [-1, 1]."""
    if isinstance(image, Tensor):
        return (image.permute(1, 2, 0) * 2 - 1).contiguous()
    return to_minus_one_one(image.convert("RGB"))


def _with_extensions(folder: Path, ext: str | Sequence[str]) -> list[ImageItem]:
    wanted = {f".{name.lower().lstrip('.')}" for name in ([ext] if isinstance(ext, str) else ext)}
    items = [item for item in folder_images(folder, "the images") if item.path.suffix.lower() in wanted]
    if not items:
        raise UserError(f"{folder}: no image with ext {', '.join(sorted(wanted))}; correct ext or root_dir")
    return items


def _built(described: Any) -> Any:
    return instantiate_from_config(described) if isinstance(described, Mapping) else described


class IdRetreivalDataset(FolderData):
    """`FolderData` whose items also have `match`, another image from the list in `ret_file`.

    Args:
        ret_file: JSON file with lists of file names by file name, relative to `root_dir`.
    """

    def __init__(self, ret_file: str | Path, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.matches = read_json(ret_file, "ret_file")
        lists = self.matches.values() if isinstance(self.matches, dict) else [None]
        refuse_if(
            not all(isinstance(names, list) and names and all(isinstance(n, str) for n in names) for names in lists),
            f"{ret_file}: expected lists of file names by file name",
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        found = self.matches.get(item.name) or self.matches.get(item.path.name) or [item.name]
        name = relative_name(found[random_below(len(found))], self.root_dir, "ret_file: an image")
        return {**super().__getitem__(index), "match": self.load(ImageItem(name, self.root_dir / name, caption=""))}


class TextOnly(Dataset):
    """Dataset of captions with a black image. An item is `{image_key: float32 (s, s, 3), all -1, caption_key: str}`.

    Args:
        captions: list, or path of a text file with one caption per line.
        output_size: side in pixels.
        n_gpus: number of consecutive repeats of each caption, one for each process.
    """

    def __init__(
        self,
        captions: Sequence[str] | str | Path,
        output_size: int,
        image_key: str = "image",
        caption_key: str = "txt",
        n_gpus: int = 1,
    ) -> None:
        listed = read_list(captions, "captions") if isinstance(captions, (str, Path)) else list(captions)
        refuse_if(not listed or n_gpus < 1, f"captions {listed}, n_gpus {n_gpus}: give at least one of each")
        self.captions = [caption for caption in listed for _ in range(n_gpus)]
        self.output_size = output_size
        self.image_key, self.caption_key = image_key, caption_key

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.full((self.output_size, self.output_size, 3), -1.0)
        return {self.image_key: image, self.caption_key: self.captions[index]}


class hf_dataset(Dataset):
    """Dataset of images and captions in a local folder, in the layout `imagefolder` of the hub.

    Captions are in the column `text_column` of the metadata file, or in `name.txt` beside each image. The default
    column may have a synonym. A subfolder `split` takes precedence over the folder.

    Raises:
        UserError: `name` is not a local folder. Nothing is downloaded.
    """

    def __init__(
        self,
        name: str,
        image_transforms: Sequence[Any] | None = None,
        image_column: str = "image",
        text_column: str = _TEXT_COLUMN,
        split: str = "train",
        image_key: str = "image",
        caption_key: str = "txt",
    ) -> None:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"hf_dataset: no folder {str(folder.absolute())!r}, and nothing is downloaded from a hub; save the "
                f"data set's {image_column!r} as image files there, with {text_column!r} in metadata.jsonl"
            )
        folder = folder / split if (folder / split).is_dir() else folder
        metadata = metadata_file(folder)
        if metadata is None or text_column == _TEXT_COLUMN:
            self.items = find_images(folder)
        else:
            self.items = _listed(metadata, folder, text_column)
        self.sample_keys = [item.name for item in self.items]
        self.transform = build_transform(image_transforms)
        self.image_key, self.caption_key = image_key, caption_key

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        with naming(item.name):
            image = as_model_input(read_image(item, self.transform))
        return {self.image_key: image, self.caption_key: item.caption or ""}
