"""The data module of pre-encoded shards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ldm.data.base_module import BaseDataModule
from ldm.data.dropout import CaptionDropout, EpochItems, load_null
from ldm.data.loader import ResumableLoader, SampleLoader, StreamLoader
from ldm.data.prior import PriorBatchSampler, WithPrior, check_prior, check_teacher
from ldm.data.stream import ShardStream
from ldm.shards.open import open_shards
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CONTEXT, LATENT, TEACHER_KEYS, TEXT_ENCODINGS, TEXT_KEYS, null_path
from ldm.shards.urls import expand_urls, is_stream
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


class WebDataNpyModuleFromConfig(BaseDataModule):
    """Pre-encoded WebDataset shards: latents or posteriors and text embeddings as `.npy` members of tars.

    Batches hold `first_stage_key` `(B, channels, h, w)`, `cond_stage_key` `(B, 77, 768)` as stored (float16), and the
    captions `txt` and names `__key__` as lists of strings. Sets whose images differ in size are batched by size.

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
        prior_ratio: float = 1.0,  # prior samples for each training sample of batch_size; they come on top of it
        extra_keys: list[str] | None = None,  # further members to read, such as those of a second text encoder
        verify_shards: bool = True,  # read new shards once as a whole, against the checksums of their index
    ) -> None:
        super().__init__(batch_size, num_workers, seed, drop_last)
        check_number("data.params.null_cond_dropout", null_cond_dropout, least=0, most=1, whole=False)
        check_number("data.params.prior_ratio", prior_ratio, above=0, whole=False)
        self.urls = {"training": training_urls, "prior": prior_urls, "validation": val_urls, "test": test_urls}
        self.prior_ratio = prior_ratio
        self.extra_keys = tuple(extra_keys or ())
        self.verify_shards = verify_shards
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
            if self._has_teacher():
                check_teacher(self.datasets["prior"], self._model())
        elif self._has_teacher():
            raise UserError("model.params.prior_target is teacher, but data.params.prior_urls names no shards")

    def _has_teacher(self) -> bool:
        return getattr(self._model(), "prior_target", None) == "teacher"

    def _model(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _keys(self) -> tuple[str, str]:
        model = self._model()
        first = self.first_stage_key or getattr(model, "first_stage_key", None) or LATENT
        return first, self.cond_stage_key or getattr(model, "cond_stage_key", None) or CONTEXT

    def _open(self, split: str) -> ShardDataset | ShardStream:
        urls = expand_urls(self.urls[split])
        if split != "prior" and any(map(is_stream, urls)):  # a prior is read in any order
            return self._open_stream(split, urls)
        verify = self.verify_shards and (self.trainer is None or self.trainer.local_rank == 0)
        extra = (*self.extra_keys, *(TEACHER_KEYS if split == "prior" and self._has_teacher() else ()))
        dataset = open_shards(self.urls[split], *self._keys(), extra, verify=verify)
        logger.info("%s data: %d samples in %d shards%s", split, len(dataset), len(dataset.paths), _describe(dataset))
        return dataset

    def _open_stream(self, split: str, urls: list[str]) -> ShardStream:
        dataset = ShardStream(urls, *self._keys(), extra=self.extra_keys, **self._rank())
        # The first sample tells the shapes, and what is wrong before the training starts.
        if next(iter(dataset), None) is None:
            raise UserError(f"no samples in {dataset.urls[0]}")
        logger.info("%s data: streamed from %d shards%s", split, len(urls), _describe(dataset))
        return dataset

    def _dropout(self, dataset: ShardDataset | ShardStream, urls: list[str]) -> CaptionDropout | None:
        if not self.null_cond_dropout:
            return None
        key = self._keys()[1]
        if key in TEXT_KEYS:
            return CaptionDropout({key: ""}, self.null_cond_dropout, self.seed)
        if self.null_cond_path is None and is_stream(urls[0]):
            raise UserError("null_cond_dropout with streamed shards needs null_cond_path, a local file")
        folder = Path(urls[0]).parent
        paths = {key: Path(self.null_cond_path or null_path(folder, key))}
        paths |= {other: null_path(folder, other) for other in self.extra_keys if other in TEXT_ENCODINGS}
        nulls = {name: load_null(path) for name, path in paths.items()}
        for name, null in nulls.items():
            if null.shape not in dataset.shapes[name]:
                first = next(iter(dataset.shapes[name]))
                raise UserError(f"{paths[name]}: shape {null.shape}, but the shards' {name} is {first}")
        return CaptionDropout(nulls, self.null_cond_dropout, self.seed)

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
        sampler = self._sampler(dataset.groups(), dataset.sample_keys, split, shuffle=shuffle, drop_last=drop_last)
        items = EpochItems(dataset, dropout, self.run_seed if training else None)
        if training and "prior" in self.datasets:
            prior = self.datasets["prior"]
            items = WithPrior(items, prior, dropout, getattr(self._model(), "num_timesteps", None))
            sampler = PriorBatchSampler(sampler, len(prior), self.prior_ratio, prior.sample_keys)
        loader = ResumableLoader if training else SampleLoader
        return loader(items, batch_sampler=sampler, num_workers=self.num_workers, together=self._is_shared())

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
