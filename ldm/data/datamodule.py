"""Data module of pre-encoded shards."""

from __future__ import annotations

import logging
from typing import Any

from ldm.data.base_module import BaseDataModule
from ldm.data.dropout import CaptionDropout, Change, EditDropout, EpochItems, InTurn, choices, load_null
from ldm.data.loader import ReadTogether, ResumableLoader, SampleLoader, StreamLoader
from ldm.data.prior import PriorBatchSampler, WithPredictions, WithPrior, check_prior, check_taught, check_teacher
from ldm.data.stored_masks import MaskChoice, load_blanks
from ldm.data.stream import ShardStream
from ldm.data.weights import sample_weights
from ldm.remote.path import ShardPath, as_path
from ldm.shards.open import (
    check_members,
    common_caption_settings,
    describe_shapes,
    for_family,
    open_shards,
    say_unread_masks,
    streamed,
    warn_of_scale,
)
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import (
    CONTEXT,
    EDIT,
    LATENT,
    LOSS_MASK,
    MASK,
    MASKED_IMAGE,
    NUMBERED,
    TEACHER_KEYS,
    TEXT_ENCODINGS,
    TEXT_KEYS,
    TIMESTEPS,
    null_path,
    plain,
)
from ldm.shards.urls import expand_urls, shard_weights, without_weights
from ldm.util import UserError, check_number, refuse_if

logger = logging.getLogger(__name__)

_FULL_MASKS = 0.25  # default of full_mask_share


class WebDataNpyModuleFromConfig(BaseDataModule):
    """Data module of pre-encoded WebDataset shards, whose tars have latents or posteriors and text embeddings.

    A batch has these entries, with the stored dtype (float16), and the further conditioning of the model:

        first_stage_key   latents or posteriors (B, channels, h, w)
        cond_stage_key    text embeddings, such as (B, 77, 768)
        txt, __key__      captions and names of the samples, lists of strings

    All images of a batch have the same size. Each sample has at most one mask.

    For a model of edits, the model's `dropout` replaces `null_cond_dropout`. It drops captions and images before the
    edit.

    With `prior_urls`, a training batch also has samples of this set after its own, and the entries of `WithPrior`.
    A batch has predictions of a teacher if the model's `prior_target` or `DirectConsistency` needs them.
    """

    def __init__(
        self,
        batch_size: int,
        training_urls: str | list[str | dict[str, Any]] | None = None,  # a dict has urls and their weight
        val_urls: str | list[str] | None = None,
        test_urls: str | list[str] | None = None,
        num_workers: int = 0,
        null_cond_dropout: float = 0.0,  # share of training captions that the empty caption replaces
        null_cond_path: str | None = None,  # its encoding; default: null.<cond_stage_key>.npy beside the shards
        full_mask_share: float | None = None,  # share of samples with masks that are completely masked; default: 0.25
        first_stage_key: str | None = None,  # default: that of the model, f8 in the recipe
        cond_stage_key: str | None = None,  # default: that of the model, t5 in the recipe
        shuffle: bool = True,
        shuffle_buffer: int = 1000,  # samples; for streams only, since local sets are shuffled completely
        seed: int | None = None,  # default: the seed of the run
        drop_last: bool = False,
        prior_urls: str | list[str] | None = None,  # shards of the prior
        prior_ratio: float = 1.0,  # prior samples per training sample, in addition to batch_size
        extra_keys: list[str] | None = None,  # further members, in addition to the model's conditioning
        verify_shards: bool = True,  # compare the checksums of new shards with their index
        folder_repeats: bool = True,  # repeat images as often as their folders' names say, such as 10_name
    ) -> None:
        super().__init__(batch_size, num_workers, seed, drop_last)
        check_number("data.params.null_cond_dropout", null_cond_dropout, least=0, most=1, whole=False)
        check_number("data.params.full_mask_share", full_mask_share, least=0, most=1, whole=False, optional=True)
        check_number("data.params.prior_ratio", prior_ratio, above=0, whole=False)
        self.weights = shard_weights(training_urls) if not isinstance(training_urls, (str, type(None))) else {}
        self.folder_repeats = folder_repeats
        training = without_weights(training_urls)
        self.urls = {"training": training, "prior": prior_urls, "validation": val_urls, "test": test_urls}
        self.prior_ratio = prior_ratio
        self.extra_keys = tuple(extra_keys or ())
        self.verify_shards = verify_shards
        self.null_cond_dropout = null_cond_dropout
        self.null_cond_path = null_cond_path
        self.full_mask_share = full_mask_share
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.datasets: dict[str, ShardDataset | ShardStream] = {}

    def setup(self, stage: str | None = None) -> None:
        """Index the shards of `stage`, log their content, and check it against the model."""
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
        common_caption_settings(self.datasets.values())  # all sets must agree
        if "training" in self.datasets:
            self._check_prior()

    def _check_prior(self) -> None:
        if "prior" in self.datasets:
            check_prior(self.datasets["training"], self.datasets["prior"])
        elif self._is_taught("prior"):
            raise UserError("model.params.prior_target is teacher, but data.params.prior_urls names no shards")
        if self._is_taught("training"):
            check_taught(self.datasets["training"])
        for split in filter(self._is_taught, self.datasets):
            check_teacher(self.datasets[split], self._model())

    def _is_taught(self, split: str) -> bool:
        """Return True if the model reads the predictions of a teacher in a set."""
        model = self._model()
        if split == "training":
            return getattr(getattr(model, "weighting", None), "reads_predictions", False)
        return split == "prior" and getattr(model, "prior_target", None) == "teacher"

    def _model(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _keys(self) -> tuple[str, str]:
        model = self._model()
        first = self.first_stage_key or getattr(model, "first_stage_key", None) or LATENT
        return first, self.cond_stage_key or getattr(model, "cond_stage_key", None) or CONTEXT

    def _extra_keys(self) -> tuple[str, ...]:
        """Return the further members to read, in addition to `_keys`."""
        conditioning = getattr(self._model(), "conditioning_entries", ())
        of_loss = getattr(getattr(self._model(), "weighting", None), "entries", ())
        return tuple(dict.fromkeys([*conditioning, *of_loss, *self.extra_keys]))

    def _open(self, split: str) -> ShardDataset | ShardStream:
        urls = expand_urls(self.urls[split])
        if split != "prior" and streamed(urls) is not None:  # a prior needs random access
            return self._open_stream(split, urls)
        verify = self.verify_shards and (self.trainer is None or self.trainer.local_rank == 0)
        extra = self._extra_keys()
        if split == "prior":  # trained as a whole
            extra = tuple(key for key in extra if key != LOSS_MASK)
        extra = (*extra, *(TEACHER_KEYS if self._is_taught(split) else ()))
        check_members(urls, [*self._keys(), *extra], for_training=self._model() is not None)
        dataset = open_shards(self.urls[split], *self._keys(), extra, verify=verify, remote=True)
        shapes = describe_shapes(dataset)
        logger.info("%s data: %d samples in %d shards%s", split, len(dataset), len(dataset.paths), shapes)
        if split == "training" and LOSS_MASK not in extra:
            say_unread_masks(dataset)
        if not getattr(self._model(), "scale_by_std", True):
            warn_of_scale(dataset, self._model().scale_factor)
        return dataset

    def _open_stream(self, split: str, urls: list[str]) -> ShardStream:
        if split == "training" and any(weight != 1 for weight in self.weights.values()):
            raise UserError(f"data.params.training_urls: a weight needs local shards, but {urls[0]} is a stream")
        dataset = ShardStream(urls, *self._keys(), extra=self._extra_keys(), **self._rank())
        # Read the first sample for its shapes, and to find errors before training starts.
        if next(iter(dataset), None) is None:
            raise UserError(f"no samples in {len(urls)} streamed shards, such as {dataset.urls[0]}; check the list")
        logger.info("%s data: streamed from %d shards%s", split, len(urls), describe_shapes(dataset))
        return dataset

    def _change(
        self, dataset: ShardDataset | ShardStream, training: bool, dropout: CaptionDropout | None
    ) -> Change | None:
        """Return the change of the samples of `dataset`: choices of variant, caption and mask, then `dropout`."""
        has_masks = set(NUMBERED) <= set(dataset.keys)
        refuse_if(
            training and self.full_mask_share and not has_masks,
            f"data.params.full_mask_share {self.full_mask_share}: the training samples have no masks; leave it out",
        )
        masks = self._mask_choice(dataset, training) if has_masks else None
        changes = [*choices(dataset, self.seed), *(change for change in (masks, dropout) if change is not None)]
        return InTurn(changes) if changes else None

    def _mask_choice(self, dataset: ShardDataset | ShardStream, training: bool) -> MaskChoice:
        count = sum(plain(key) == MASK for key in dataset.keys)
        if not training:
            return MaskChoice(count)
        blanks = {}
        share = _FULL_MASKS if self.full_mask_share is None else self.full_mask_share
        if share:
            blanks = load_blanks(self._null_folder(dataset, "full_mask_share"), dataset.shapes[MASKED_IMAGE])
        return MaskChoice(count, blanks, share, self.seed)

    def _dropout(self, dataset: ShardDataset | ShardStream) -> CaptionDropout | None:
        kind, share, of_edits = CaptionDropout, self.null_cond_dropout, getattr(self._model(), "dropout", None)
        if EDIT in dataset.keys and of_edits is not None:
            kind, share = EditDropout, of_edits
            refuse_if(
                self.null_cond_dropout,
                f"data.params.null_cond_dropout {self.null_cond_dropout}: captions and images of edits are dropped "
                f"by model.params.dropout, which is {share}; leave it out",
            )
        if not share:
            return None
        key = self._keys()[1]
        if key in TEXT_KEYS:
            return kind({key: kind.null_caption(self._model())}, share, self.seed)
        folder = self._null_folder(dataset, "null_cond_dropout")
        others = [other for other in TEXT_ENCODINGS if other in dataset.keys and other != key]
        paths = {key: as_path(self.null_cond_path or null_path(folder, key))}
        paths |= {other: null_path(folder, other) for other in others}
        nulls = {name: load_null(path) for name, path in paths.items()}
        for name, null in nulls.items():
            if null.shape not in dataset.shapes[name]:
                first = next(iter(dataset.shapes[name]))
                raise UserError(f"{paths[name]}: shape {null.shape}, but {name} in the shards has {first}")
        return kind(nulls, share, self.seed)

    def _null_folder(self, dataset: ShardDataset | ShardStream, setting: str) -> ShardPath:
        """Return the folder of the files `null.*.npy`: that of `null_cond_path`, or of the shards."""
        if self.null_cond_path is not None:
            return as_path(self.null_cond_path).parent
        refuse_if(
            isinstance(dataset, ShardStream), f"{setting} with streamed shards needs null_cond_path, a local file"
        )
        return dataset.paths[0].parent

    def _check_model(self, dataset: ShardDataset | ShardStream) -> None:
        check = getattr(self._model(), "check_batch_shapes", None)
        if check is None:
            return
        first, _ = self._keys()
        for latent in dataset.shapes[first]:
            # Maps have the height and width of the latent. Other members have one shape.
            shapes = {
                key: next((shape for shape in found if shape[1:] == latent[1:]), next(iter(found)))
                for key, found in dataset.shapes.items()
                if found and plain(key) == key
            }
            try:
                check({**shapes, first: latent})
            except UserError as error:
                raise UserError(f"{error}{for_family(dataset)}") from error

    def _loader(self, split: str, shuffle: bool, drop_last: bool = False) -> SampleLoader:
        dataset = self.datasets[split]
        training = split == "training"
        # A teacher's prediction belongs to the sample's caption, which must not be dropped.
        taught, dropout = self._is_taught(split), self._dropout(dataset) if training else None
        dataset.keeps_captions = training and dataset.has_several_captions
        dataset.keeps_variants = training and dataset.has_several_variants
        change = self._change(dataset, training, None if taught else dropout)
        if isinstance(dataset, ShardStream):
            dataset.seed, dataset.change = self.seed, change
            dataset.shuffle_buffer = self.shuffle_buffer if shuffle else 0
            if self.trainer is not None:
                dataset.set_epoch(self.trainer.current_epoch)  # Lightning sets the epoch after the first batch
            return StreamLoader(dataset, self.batch_size, num_workers=self.num_workers, drop_last=drop_last)
        weights = sample_weights(dataset, self.weights, self.folder_repeats) if training else None
        order = {"weights": weights, "shuffle": shuffle, "drop_last": drop_last}
        sampler = self._sampler(dataset.groups(), dataset.sample_keys, split, **order)
        items = EpochItems(dataset, change, self.run_seed if training else None, held_out=not training)
        timesteps = getattr(self._model(), "num_timesteps", None)
        items = WithPredictions(items, timesteps) if taught else items
        if training and "prior" in self.datasets:
            prior = self.datasets["prior"]
            change = self._change(prior, training, None if TIMESTEPS in prior.keys else dropout)
            items = WithPrior(items, prior, change, timesteps)
            sampler = PriorBatchSampler(sampler, len(prior), self.prior_ratio, prior.sample_keys)
        if dataset.is_remote or self.datasets.get("prior", dataset).is_remote:
            items = ReadTogether(items)
        loader = ResumableLoader if training else SampleLoader
        return loader(items, batch_sampler=sampler, num_workers=self.num_workers, together=self._is_shared())

    def train_dataloader(self) -> SampleLoader:
        refuse_if("training" not in self.datasets, "data.params.training_urls is missing: give the training shards")
        return self._loader("training", self._shuffle_training(self.shuffle), self.drop_last)

    def val_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("validation", shuffle=False) if "validation" in self.datasets else []

    def test_dataloader(self) -> SampleLoader | list[SampleLoader]:
        return self._loader("test", shuffle=False) if "test" in self.datasets else []
