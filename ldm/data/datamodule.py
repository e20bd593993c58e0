"""The data modules that YAML files name: pre-encoded shards, and ordinary datasets by config."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from ldm.data.dropout import CaptionDropout, EpochItems, load_null
from ldm.data.index import check_against_index
from ldm.data.loader import ResumableLoader, SampleLoader, SeededDataset, StreamLoader
from ldm.data.prior import PriorBatchSampler, WithPrior, check_prior
from ldm.data.sampling import EpochBatchSampler
from ldm.data.shards import TEACHER_KEYS, TEXT_KEYS, ShardDataset
from ldm.data.stream import ShardStream
from ldm.data.urls import expand_urls, is_stream, names_all_there
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)


def _check_number(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:  # a bool is an int too
        raise UserError(f"data.params.{name} {value!r}: give a whole number of at least {least}")


class _DataModule(pl.LightningDataModule):
    """What both data modules share: sizes, seed, and the share of this rank."""

    def __init__(self, batch_size: int, num_workers: int, seed: int | None, drop_last: bool) -> None:
        super().__init__()
        _check_number("batch_size", batch_size, 1)
        _check_number("num_workers", num_workers, 0)
        if seed is not None:
            _check_number("seed", seed, 0)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed_is_given = seed is not None
        # `seed_everything` leaves the run's seed in this variable; what training draws follows it in any case.
        self.run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.seed = self.run_seed if seed is None else seed
        self.drop_last = drop_last

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run goes on in the order that it began with, unless its config sets another seed."""
        if not self.seed_is_given:
            self.seed = state_dict["seed"]

    def _rank(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world": 1}
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size}

    def _sampler(self, groups: list[np.ndarray], name: str, **options: bool) -> EpochBatchSampler:
        sampler = EpochBatchSampler(groups, self.batch_size, seed=self.seed, **options, **self._rank())
        if len(sampler) == 0:
            counts = f"{sum(map(len, groups))} samples, batch_size {self.batch_size}, ranks {self._rank()['world']}"
            raise UserError(f"the {name} data make no batch: {counts}, drop_last {options.get('drop_last', False)}")
        return sampler

    def _shuffle_training(self, shuffle: bool) -> bool:
        # overfitting means the same batches in every epoch
        return shuffle and not (self.trainer is not None and self.trainer.overfit_batches)


class WebDataNpyModuleFromConfig(_DataModule):
    """Pre-encoded WebDataset shards: latents or posteriors and text embeddings as `.npy` members of tars.

    Batches hold `first_stage_key` `(B, channels, h, w)`, `cond_stage_key` `(B, 77, 768)` as stored (float16), and the
    captions `txt` and names `__key__` as lists of strings. Sets whose pictures differ in size are batched by size.

    With `prior_urls`, a training batch has samples of that set behind its own, and the entries of `WithPrior`; those of
    a teacher if the model's `prior_target` asks for one.
    """

    def __init__(
        self,
        batch_size: int,
        training_urls: str | list[str] | None = None,
        val_urls: str | list[str] | None = None,
        test_urls: str | list[str] | None = None,
        num_workers: int = 0,
        null_cond_dropout: float = 0.0,  # share of the training captions replaced by the empty one
        null_cond_path: str | None = None,  # its encoding; by default null.<cond_stage_key>.npy beside the shards
        first_stage_key: str | None = None,  # by default the model's, which is f8 in the recipe
        cond_stage_key: str | None = None,  # by default the model's, which is t5 in the recipe
        shuffle: bool = True,
        shuffle_buffer: int = 1000,  # samples; for streams only, everything else is shuffled as a whole
        seed: int | None = None,  # by default the run's
        drop_last: bool = False,
        prior_urls: str | list[str] | None = None,  # shards of what should not be forgotten
        prior_ratio: float = 1.0,  # their samples in a batch, a training sample of batch_size
    ) -> None:
        super().__init__(batch_size, num_workers, seed, drop_last)
        if not isinstance(null_cond_dropout, (int, float)) or not 0 <= null_cond_dropout <= 1:
            raise UserError(f"data.params.null_cond_dropout {null_cond_dropout!r} is no number from 0 to 1")
        if not isinstance(prior_ratio, (int, float)) or not 0 < prior_ratio < math.inf:
            raise UserError(f"data.params.prior_ratio {prior_ratio!r} is no number above 0")
        self.urls = {"training": training_urls, "prior": prior_urls, "validation": val_urls, "test": test_urls}
        self.prior_ratio = prior_ratio
        self.null_cond_dropout = null_cond_dropout
        self.null_cond_path = null_cond_path
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.datasets: dict[str, ShardDataset | ShardStream] = {}

    def setup(self, stage: str | None = None) -> None:
        """Index the shards of `stage`, say what they hold, and check it against the model."""
        splits = {
            "fit": ["training", "prior", "validation"],
            "validate": ["validation"],
            "test": ["test"],
            "predict": [],
        }
        for split in splits.get(stage, list(self.urls)):
            if self.urls[split] and split not in self.datasets:
                self.datasets[split] = self._open(split)
            if split in self.datasets:
                self._check_model(self.datasets[split])
        if "training" in self.datasets:
            self._check_prior()

    def _check_prior(self) -> None:
        if "prior" in self.datasets:
            check_prior(self.datasets["training"], self.datasets["prior"])
        elif self._has_teacher():
            raise UserError("model.params.prior_target is teacher, but data.params.prior_urls names no shards")

    def _has_teacher(self) -> bool:
        return getattr(self._model(), "prior_target", None) == "teacher"

    def _model(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _keys(self) -> tuple[str, str]:
        model = self._model()
        first = self.first_stage_key or getattr(model, "first_stage_key", None) or "f8"
        return first, self.cond_stage_key or getattr(model, "cond_stage_key", None) or "t5"

    def _open(self, split: str) -> ShardDataset | ShardStream:
        urls = expand_urls(self.urls[split])
        if any(map(is_stream, urls)):
            if split == "prior":
                raise UserError(f"data.params.prior_urls: {urls[0]} is a stream; give local shards, read in any order")
            dataset = ShardStream(urls, *self._keys(), **self._rank())
            # The first sample tells the shapes, and what is wrong before the training starts.
            if next(iter(dataset), None) is None:
                raise UserError(f"no samples in {dataset.urls[0]}")
            logger.info("%s data: streamed from %d shards%s", split, len(urls), _describe(dataset))
            return dataset
        check_against_index(urls, whole=names_all_there(self.urls[split]))
        extra = TEACHER_KEYS if split == "prior" and self._has_teacher() else ()
        dataset = ShardDataset(urls, *self._keys(), extra)
        logger.info("%s data: %d samples in %d shards%s", split, len(dataset), len(urls), _describe(dataset))
        return dataset

    def _dropout(self, dataset: ShardDataset | ShardStream, urls: list[str]) -> CaptionDropout | None:
        if not self.null_cond_dropout:
            return None
        key = self._keys()[1]
        if key in TEXT_KEYS:
            return CaptionDropout(key, "", self.null_cond_dropout, self.seed)
        if self.null_cond_path is None and is_stream(urls[0]):
            raise UserError("null_cond_dropout with streamed shards needs null_cond_path, a local file")
        path = Path(self.null_cond_path or Path(urls[0]).parent / f"null.{key}.npy")
        null = load_null(path)
        if null.shape not in dataset.shapes[key]:
            raise UserError(f"{path}: shape {null.shape}, but the shards' {key} is {next(iter(dataset.shapes[key]))}")
        return CaptionDropout(key, null, self.null_cond_dropout, self.seed)

    def _check_model(self, dataset: ShardDataset | ShardStream) -> None:
        check = getattr(self._model(), "check_batch_shapes", None)
        if check is None:
            return
        first, cond = self._keys()
        for shape in dataset.shapes[first]:
            check({first: shape, **{cond: other for other in dataset.shapes.get(cond, ())}})  # noqa: B035

    def _loader(self, split: str, shuffle: bool, drop_last: bool = False) -> SampleLoader:
        dataset = self.datasets[split]
        training = split == "training"
        urls = dataset.urls if isinstance(dataset, ShardStream) else [str(path) for path in dataset.paths]
        dropout = self._dropout(dataset, urls) if training else None
        if isinstance(dataset, ShardStream):
            dataset.seed, dataset.dropout = self.seed, dropout
            dataset.shuffle_buffer = self.shuffle_buffer if shuffle else 0
            if self.trainer is not None:
                dataset.set_epoch(self.trainer.current_epoch)  # the first batch is fetched before Lightning says so
            return StreamLoader(dataset, self.batch_size, num_workers=self.num_workers, drop_last=drop_last)
        sampler = self._sampler(dataset.groups(), split, shuffle=shuffle, drop_last=drop_last)
        items = EpochItems(dataset, dropout, self.run_seed if training else None)
        if training and "prior" in self.datasets:
            prior = self.datasets["prior"]
            items = WithPrior(items, prior, dropout, getattr(self._model(), "num_timesteps", None))
            sampler = PriorBatchSampler(sampler, len(prior), self.prior_ratio)
        loader = ResumableLoader if training else SampleLoader
        return loader(items, batch_sampler=sampler, num_workers=self.num_workers)

    def train_dataloader(self) -> SampleLoader:
        if "training" not in self.datasets:
            raise UserError("data.params.training_urls is missing: name the shards to train on")
        return self._loader("training", self._shuffle_training(self.shuffle), self.drop_last)

    def val_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("validation", shuffle=False) if "validation" in self.datasets else []

    def test_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("test", shuffle=False) if "test" in self.datasets else []


def _describe(dataset: ShardDataset | ShardStream) -> str:
    """`", f8 8x64x64 float16, t5 77x768 float16"`."""
    parts = []
    for key, shapes in dataset.shapes.items():
        parts += [f", {key} {'x'.join(map(str, shape))} {dtype}" for shape, dtype in shapes.items()]
    return "".join(parts)


class DataModuleFromConfig(_DataModule):
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
            _check_number("batch_size", batch_size, 1)
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
        sampler = self._sampler([np.arange(len(dataset))], split, shuffle=shuffle, drop_last=drop_last)
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
