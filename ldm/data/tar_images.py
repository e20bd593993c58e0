"""Dataset of images, captions and metadata in local tars of LAION's tools, with filters."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import Dataset

from ldm.data.listed import naming, read_image
from ldm.data.parsed import read_yaml
from ldm.data.simple import as_model_input
from ldm.files import open_file, read_span
from ldm.identity import Identity, check_identity, identity_of_path, read_with_retries
from ldm.images.augmentations import build_transform
from ldm.images.captions import decode_caption
from ldm.images.decode import EXTENSIONS
from ldm.images.find import ImageItem
from ldm.shards.tar import TarSample, index_tar
from ldm.util import UserError, instantiate_from_config, refuse_if

logger = logging.getLogger(__name__)


class Filter:
    """Filter of samples by LAION's metadata. A sample without a required number is excluded.

    Args:
        min_size: minimum of `original_width` and `original_height` in pixels.
        max_pwatermark: maximum of `pwatermark`; 1 or more for no filter.
        p_unsafe_threshold: maximum of `punsafe`; 1 or more for no filter.
        words: words that exclude a caption.
    """

    def __init__(
        self,
        min_size: int | None = None,
        max_pwatermark: float | None = None,
        p_unsafe_threshold: float | None = None,
        words: Sequence[str] = (),
    ) -> None:
        self.min_size = min_size
        self.most = {
            name: most
            for name, most in {"pwatermark": max_pwatermark, "punsafe": p_unsafe_threshold}.items()
            if most is not None and most < 1
        }
        self.words = [word.lower() for word in words]

    def __bool__(self) -> bool:
        return bool(self.min_size or self.most or self.words)

    def __call__(self, metadata: Mapping[str, Any], caption: str) -> bool:
        if self.min_size:
            sides = [metadata.get(name) for name in ("original_width", "original_height")]
            if not all(isinstance(side, (int, float)) and side >= self.min_size for side in sides):
                return False
        for name, most in self.most.items():
            value = metadata.get(name)
            if not isinstance(value, (int, float)) or value > most:
                return False
        return not any(word in caption.lower() for word in self.words)


def read_words(file: str | Path | None) -> list[str]:
    """Return the words of a YAML list or mapping of lists, or nothing for None."""
    if file is None:
        return []
    found = read_yaml(file, "filter_word_list")
    lists = list(found.values()) if isinstance(found, dict) else [found]
    wrong = next((type(words).__name__ for words in lists if not isinstance(words, list)), None)
    refuse_if(wrong, f"filter_word_list {file}: holds {wrong}; give a YAML list of words, or a mapping of such lists")
    return [str(word) for words in lists for word in words]


class TarImages(Dataset):
    """Dataset of images in local tars. An item is `{image_key: (h, w, 3) in [-1, 1], "txt": caption, "__key__": str}`.

    Args:
        paths: the tars.
        image_key: extension of the images.
        image_transforms: transforms of the PIL image, by `target` and `params`.
        postprocess: `target` and `params` of a function from item to item.
        keep: function of a sample's metadata (its `.json`) and caption that returns True to include it; None for all.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_key: str = "jpg",
        image_transforms: Any = None,
        postprocess: Any = None,
        keep: Filter | None = None,
    ) -> None:
        refuse_if(
            image_key not in EXTENSIONS, f"image_key {image_key!r}: give a file extension of images, such as jpg or png"
        )
        self.image_key = image_key
        self.samples: list[tuple[Path, TarSample]] = []
        found = 0
        self._identities: dict[Path, Identity] = {}
        for path in paths:
            self._identities[path] = identity_of_path(path)
            samples = [sample for sample in index_tar(path) if image_key in sample.spans]
            found += len(samples)
            with self._open(path) as file:
                self.samples += [(path, s) for s in samples if keep is None or keep(*_described(file.fileno(), s))]
        if not self.samples:
            why = f"none of {found} passes the filters" if found else f"no sample has a .{image_key}"
            raise UserError(f"{', '.join(map(str, paths[:3]))}: {why}")
        logger.info("%d of %d images of %d tars", len(self.samples), found, len(paths))
        self.sample_keys = [f"{path.name}/{sample.key}" for path, sample in self.samples]
        self.transform = build_transform(image_transforms)
        self.postprocess = instantiate_from_config(postprocess) if isinstance(postprocess, Mapping) else postprocess

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, sample = self.samples[index]
        name = f"{path}: {sample.key}"
        with self._open(path) as file:
            _, caption = _described(file.fileno(), sample, metadata=False)
        image = ImageItem(name, path, sample.spans[self.image_key], caption, identity=self._identities[path])
        with naming(name):
            pixels = as_model_input(read_image(image, self.transform))
            item = {self.image_key: pixels, "txt": caption, "__key__": sample.key}
            return self.postprocess(item) if self.postprocess else item

    @contextmanager
    def _open(self, path: Path) -> Iterator[BinaryIO]:
        """Open a tar, which must be the one that was indexed."""
        with read_with_retries(lambda: open_file(path), path) as file:
            check_identity(file.fileno(), path, self._identities[path])
            yield file


def _described(descriptor: int, sample: TarSample, metadata: bool = True) -> tuple[dict[str, Any], str]:
    """Return the metadata of a sample, or an empty dict, and its caption."""
    described, caption = {}, None
    if metadata and "json" in sample.spans:
        try:
            described = json.loads(read_span(descriptor, *sample.spans["json"], f"{sample.key}.json"))
        except ValueError as error:
            raise UserError(f"{sample.key}.json: not JSON: {error}") from error
    if "txt" in sample.spans:
        caption, error = decode_caption(read_span(descriptor, *sample.spans["txt"], f"{sample.key}.txt"))
        refuse_if(error, f"{sample.key}: {error}")
    return described if isinstance(described, dict) else {}, caption or ""
