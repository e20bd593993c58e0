"""The data module of ordinary datasets, named in a config."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from ldm.data.base_module import BaseDataModule, check_number
from ldm.data.loader import ResumableLoader, SampleLoader, SeededDataset, StreamLoader
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)


class DataModuleFromConfig(BaseDataModule):
    """Datasets named by `target` and `params`, one a split. Training resumes exactly, augmentations included.

    `wrap` and `use_worker_init_fn` are taken from old configs: any object with `len` and `[i]` will do here, and every
    sample is seeded.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,  # by default two a sample of a batch, and no more than there are cores
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        shuffle: bool = True,
        seed: int | None = None,  # by default the run's
        drop_last: bool = False,
    ) -> None:
        if num_workers is None:
            check_number("batch_size", batch_size, 1)
            num_workers = min(2 * batch_size, os.cpu_count() or 1)
        super().__init__(batch_size, num_workers, seed, drop_last)
        configs = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {split: config for split, config in configs.items() if config is not None}
        self.shuffle = {
            "train": shuffle,
            "validation": shuffle_val_dataloader,
            "test": shuffle_test_loader,
            "predict": False,
        }
        self.datasets: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets of `stage`, and say how many samples each has."""
        splits = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["predict"]}
        for split in splits.get(stage, list(self.dataset_configs)):
            if split in self.datasets or split not in self.dataset_configs:
                continue
            dataset = self.datasets[split] = instantiate_from_config(self.dataset_configs[split])
            size = "a stream" if isinstance(dataset, IterableDataset) else f"{len(dataset)} samples"
            logger.info("%s data: %s, %s", split, type(dataset).__name__, size)

    def _loader(self, split: str) -> SampleLoader | list[SampleLoader]:
        if split not in self.datasets:
            return []
        dataset, training = self.datasets[split], split == "train"
        drop_last = training and self.drop_last
        if isinstance(dataset, IterableDataset):
            return StreamLoader(dataset, self.batch_size, num_workers=self.num_workers, drop_last=drop_last)
        shuffle = self._shuffle_training(self.shuffle[split]) if training else self.shuffle[split]
        keys = getattr(dataset, "sample_keys", ())  # as of shards, and of images
        sampler = self._sampler([np.arange(len(dataset))], keys, split, shuffle=shuffle, drop_last=drop_last)
        loader = ResumableLoader if training else SampleLoader
        items = SeededDataset(dataset, self.seed, self.run_seed if training else None)
        return loader(items, batch_sampler=sampler, num_workers=self.num_workers)

    def train_dataloader(self) -> SampleLoader | list[SampleLoader]:
        if "train" not in self.datasets:
            raise UserError("data.params.train is missing: name the dataset to train on by target and params")
        return self._loader("train")

    def val_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("validation")

    def test_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        if "predict" not in self.datasets:
            return []
        # Lightning builds this one again to follow the sample numbers, which only a plain loader lets it.
        return DataLoader(self.datasets["predict"], self.batch_size, num_workers=self.num_workers)
