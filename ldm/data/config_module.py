"""Data module of the datasets in a config."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from ldm.data.base import Txt2ImgIterableBaseDataset, share_among_workers
from ldm.data.base_module import MOST_WORKERS, BaseDataModule
from ldm.data.loader import ResumableLoader, SampleLoader, SeededDataset, StreamLoader, seeded
from ldm.data.sizes import check_sizes
from ldm.images.batch_augmentation import BatchAugmentation
from ldm.shards.sample import STREAM
from ldm.util import check_number, instantiate_from_config, refuse_if

logger = logging.getLogger(__name__)


class DataModuleFromConfig(BaseDataModule):
    """Data module with one dataset per split, given by `target` and `params`. Training resumes exactly.

    Args:
        num_val_workers: worker processes of the other splits. The default is `num_workers`.
        wrap, use_worker_init_fn: accepted for old configs and ignored. A dataset is any object with `len` and `[i]`,
            each sample is seeded, and iterable datasets are always divided among workers.
        augment: augmentation of the training images on the device; see `BatchAugmentation`.
        image_key: batch entry that holds the images.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,  # default: two per sample of a batch, at most the number of cores
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        shuffle: bool = True,
        seed: int | None = None,  # default: the seed of the run
        drop_last: bool = False,
        augment: Mapping[str, Mapping[str, Any]] | None = None,
        image_key: str = "image",
        num_val_workers: int | None = None,
    ) -> None:
        if num_workers is None:
            check_number("data.params.batch_size", batch_size, least=1)
            num_workers = min(2 * batch_size, os.cpu_count() or 1)
        super().__init__(batch_size, num_workers, seed, drop_last)
        check_number("data.params.num_val_workers", num_val_workers, least=0, most=MOST_WORKERS, optional=True)
        self.num_val_workers = num_workers if num_val_workers is None else num_val_workers
        self.val_batch_size = batch_size
        configs = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {split: config for split, config in configs.items() if config is not None}
        self.shuffle = {
            "train": shuffle,
            "validation": shuffle_val_dataloader,
            "test": shuffle_test_loader,
            "predict": False,
        }
        self.datasets: dict[str, Any] = {}
        self.augmentation = BatchAugmentation(augment) if augment else None
        self.image_key = image_key

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets of `stage`, and log their numbers of samples."""
        splits = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["predict"]}
        for split in splits.get(stage, list(self.dataset_configs)):
            if split in self.datasets or split not in self.dataset_configs:
                continue
            dataset = self.datasets[split] = self.build_dataset(split)
            size = "a stream" if isinstance(dataset, IterableDataset) else f"{len(dataset)} samples"
            logger.info("%s data: %s, %s", split, type(dataset).__name__, size)
            if stage == "fit" and not isinstance(dataset, IterableDataset) and self.trainer is not None:
                with seeded(self.seed, 0, 0):
                    check_sizes(self.trainer.lightning_module, dataset[0] if len(dataset) else None, split)

    def build_dataset(self, split: str) -> Any:
        """Return the dataset of `split`."""
        return instantiate_from_config(self.dataset_configs[split])

    def _loader(self, split: str) -> SampleLoader | list[SampleLoader]:
        if split not in self.datasets:
            return []
        dataset, training = self.datasets[split], split == "train"
        drop_last = training and self.drop_last
        batch_size, workers = self._sizes(split)
        if isinstance(dataset, IterableDataset):
            options = {"num_workers": workers, "drop_last": drop_last}
            if isinstance(dataset, Txt2ImgIterableBaseDataset):
                dataset.share(**self._rank())
                options["worker_init_fn"] = share_among_workers
            return StreamLoader(dataset, batch_size, **options)
        shuffle = self._shuffle_training(self.shuffle[split]) if training else self.shuffle[split]
        keys = getattr(dataset, "sample_keys", ())  # of datasets of shards and images
        groups = [np.arange(len(dataset))]
        sampler = self._sampler(groups, keys, split, batch_size, shuffle=shuffle, drop_last=drop_last)
        loader = ResumableLoader if training else SampleLoader
        items = SeededDataset(dataset, self.seed, self.run_seed if training else None)
        return loader(items, batch_sampler=sampler, num_workers=workers, together=self._is_shared())

    def _sizes(self, split: str) -> tuple[int, int]:
        """Return batch size and number of workers of `split`."""
        training = split == "train"
        return (self.batch_size, self.num_workers) if training else (self.val_batch_size, self.num_val_workers)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment the images of a training batch on their device."""
        if self.augmentation is None or self.trainer is None or not self.trainer.training:
            return batch
        refuse_if(
            not isinstance(batch, dict) or self.image_key not in batch or STREAM not in batch,
            f"data.params.augment: training samples have no entry {self.image_key!r}; set image_key",
        )
        return {**batch, self.image_key: self.augmentation(batch[self.image_key], batch[STREAM])}

    def train_dataloader(self) -> SampleLoader | list[SampleLoader]:
        refuse_if(
            "train" not in self.datasets, "data.params.train is missing: give the training dataset by target and params"
        )
        return self._loader("train")

    def val_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("validation")

    def test_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        if "predict" not in self.datasets:
            return []
        # Lightning rebuilds this loader to track sample numbers, which needs a plain DataLoader.
        batch_size, workers = self._sizes("predict")
        return DataLoader(self.datasets["predict"], batch_size, num_workers=workers)
