"""Data module of tars with images, captions and LAION's metadata, under the names of Stability AI's configs.

The tars are local and have random access, so that a resumed run continues exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.conditions import AddEdge, AddLR, AddMask
from ldm.data.config_module import DataModuleFromConfig
from ldm.data.tar_images import Filter, TarImages, read_words
from ldm.shards.urls import expand_urls, is_stream
from ldm.util import check_keys, check_number, refuse_if

__all__ = ["AddEdge", "AddLR", "AddMask", "WebDataModuleFromConfig"]

# `shuffle` is the size of a buffer for streams. Here, 0 turns shuffling off.
# `n_examples` is the length of an epoch of streams. Here, the tars define it.
_SPLIT_KEYS = ("shards", "shuffle", "image_key", "image_transforms", "postprocess", "n_examples")


class WebDataModuleFromConfig(DataModuleFromConfig):
    """Data module of tars. Each split has `shards`, `shuffle`, `image_key`, `image_transforms` and `postprocess`.

    Items are those of `TarImages`. The training split is shuffled unless its `shuffle` is 0.

    Args:
        tar_base: folder of the shards; None if `shards` has complete paths.
        multinode, n_nodes: accepted for old configs and ignored; each process has its own share.
        min_size, max_pwatermark, p_unsafe_threshold: see `Filter`.
        filter_word_list: YAML file of words that exclude a caption.
        val_batch_size, val_num_workers: for the other splits. The default is that of training.
    """

    def __init__(
        self,
        tar_base: str | None,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        num_workers: int = 4,
        multinode: bool = True,
        n_nodes: int | None = None,
        min_size: int | None = None,
        max_pwatermark: float | None = None,
        p_unsafe_threshold: float | None = None,
        filter_word_list: str | Path | None = None,
        val_batch_size: int | None = None,
        val_num_workers: int | None = None,
        seed: int | None = None,  # default: the seed of the run
        drop_last: bool = False,
    ) -> None:
        splits = {"train": train, "validation": validation, "test": test}
        for split, given in splits.items():
            check_keys(f"data.params.{split}", given or {}, _SPLIT_KEYS)
        super().__init__(
            batch_size,
            **splits,
            num_workers=num_workers,
            num_val_workers=val_num_workers,
            shuffle=bool((train or {}).get("shuffle", True)),
            seed=seed,
            drop_last=drop_last,
        )
        if val_batch_size is not None:
            check_number("data.params.val_batch_size", val_batch_size, least=1)
            self.val_batch_size = val_batch_size
        self.tar_base = tar_base
        self.filter_settings = (min_size, max_pwatermark, p_unsafe_threshold)
        self.filter_word_list = filter_word_list

    def build_dataset(self, split: str) -> TarImages:
        """Return the images in the tars of `split` that pass the filters."""
        given = dict(self.dataset_configs[split])
        for key in ("shuffle", "n_examples"):
            given.pop(key, None)
        paths = self._paths(split, given.pop("shards", None))
        keep = Filter(*self.filter_settings, words=read_words(self.filter_word_list))
        return TarImages(paths, **given, keep=keep if keep else None)

    def _paths(self, split: str, shards: str | Sequence[str] | None) -> list[Path]:
        refuse_if(not shards, f"data.params.{split}.shards is missing: give the tars")
        refuse_if(
            self.tar_base and self.tar_base.startswith("__"),
            f"data.params.tar_base {self.tar_base!r} stands for a set on its authors' servers; "
            f"give the folder of your tars",
        )
        names = [shards] if isinstance(shards, str) else list(shards)
        names = [name.strip().removesuffix(" -") for name in names]  # the end of a shell command in old configs
        if self.tar_base:
            names = [f"{self.tar_base.rstrip('/')}/{name}" for name in names]
        paths = expand_urls(names)
        stream = next(filter(is_stream, paths), None)
        refuse_if(stream is not None, f"{stream}: is not a local tar; download it first, and set data.params.tar_base")
        return [Path(path) for path in paths]
