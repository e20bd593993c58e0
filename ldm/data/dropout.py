"""Dropout of conditioning for classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.batch_sampler import Item, held_out_entries, sample_name, stream_name
from ldm.files import MOST_IN_MEMBER, check_file, read_at_most
from ldm.remote.path import ShardPath
from ldm.remote.retries import NotServed
from ldm.shards import npy
from ldm.shards.index import EMPTY_CAPTION, ZEROS, read_index
from ldm.shards.sample import CAPTION, EDIT, STREAM, with_caption, with_variant
from ldm.shards.spans import beside_shards
from ldm.util import UserError, refuse_if

# Function from a sample, the epoch, and the sample's number or name to the changed sample.
Change = Callable[[dict[str, Any], int, int | str], dict[str, Any]]


def load_null(path: ShardPath) -> np.ndarray:
    """Return the stored encoding of the empty caption.

    Raises:
        UserError: the file is missing or damaged, or its values are not finite, or all zero. Zeros are valid if the
            index declares them for the empty caption.
    """
    null = read_array(
        path,
        "null_cond_dropout needs it: the text encoder's output for the empty caption; tools/preencode.py writes it "
        "beside the shards, null_cond_path names another place",
    )
    refuse_if(
        not null.any() and (read_index(path.parent) or {}).get(EMPTY_CAPTION) != ZEROS,
        f"{path}: is not the encoding of an empty caption: it is all zeros",
    )
    return null


def read_array(path: ShardPath, needed: str) -> np.ndarray:
    """Return the array in a file beside the shards. `needed` explains it in the message for a missing file.

    Raises:
        UserError: the file is missing or damaged, or its values are not finite.
    """
    try:
        file = beside_shards(path)
    except NotServed as error:
        raise UserError(f"{error}; {needed}") from error
    check_file(file)
    refuse_if(not file.exists(), f"{path}: not found, and {needed}")
    array = npy.decode(bytearray(read_at_most(file, MOST_IN_MEMBER)), str(path))
    refuse_if(not np.isfinite(array).all(), f"{path}: has NaN or infinite values; restore the file")
    return array


class CaptionDropout:
    """Random replacement of a sample's encodings by `nulls`, seeded by (seed, epoch, sample)."""

    def __init__(self, nulls: Mapping[str, np.ndarray | str], probability: float, seed: int) -> None:
        self.nulls = nulls
        self.probability = probability
        self.seed = seed

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        if random.Random(f"{self.seed}/{epoch}/{number}").random() < self.probability:
            sample |= self.nulls
            sample[CAPTION] = ""
        return sample

    @staticmethod
    def null_caption(model: Any) -> str:
        """Return the caption that stands for no caption in training, if `model` encodes captions itself.

        Raises:
            UserError: the model has zeros in place of the encoding of an empty caption.
        """
        stage = getattr(model, "cond_stage_model", None)
        refuse_if(
            getattr(stage, "caption_embedders", None) and stage.empties_to_zeros,
            "data.params.null_cond_dropout: this model has zeros for the encodings of empty captions; set it to 0, "
            "and ucg_rate of the embedders in cond_stage_config",
        )
        return ""


class EditDropout(CaptionDropout):
    """Random replacement of a sample's encodings by `nulls`, of its image before the edit by zeros, or of both.

    The three cases have equal probabilities (arXiv:2211.09800, section 3.2.1).
    """

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        r, share = random.Random(f"{self.seed}/{epoch}/{number}").random(), self.probability
        if r < 2 * share:
            sample |= self.nulls
            sample[CAPTION] = ""
        if share <= r < 3 * share:
            sample[EDIT] = np.zeros_like(sample[EDIT])
        return sample


class RandomChoice:
    """Random choice of one of several parts of a sample, seeded by (seed, epoch, sample).

    Args:
        what: name of the parts in the random stream.
        choose: `with_caption`, or `with_variant` of a latent.
    """

    def __init__(self, what: str, choose: Callable[..., dict[str, Any]], seed: int) -> None:
        self.what, self.choose, self.seed = what, choose, seed

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        stream = random.Random(f"{self.seed}/{epoch}/{number}/{self.what}")
        return self.choose(sample, choose=stream.randrange, name=f"sample {sample['__key__']}")


def choices(dataset: Any, seed: int) -> list[Change]:
    """Return the choices of a variant and of a caption, if the samples of `dataset` keep several."""
    of_variants = partial(with_variant, latent=dataset.first_stage_key)
    variants = [RandomChoice("variant", of_variants, seed)] if dataset.keeps_variants else []
    return [*variants, *([RandomChoice("caption", with_caption, seed)] if dataset.keeps_captions else [])]


class InTurn:
    """Sequence of changes."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = list(changes)

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        for change in self.changes:
            sample = change(sample, epoch, number)
        return sample


class EpochItems(Dataset):
    """Map-style dataset with the index (epoch, number), which applies `change` to its samples.

    With `seed`, each sample has the entry `STREAM`, the name of its random stream. With `held_out`, it has
    `held_out_entries`.
    """

    def __init__(
        self, dataset: Dataset, change: Change | None = None, seed: int | None = None, held_out: bool = False
    ) -> None:
        self.dataset = dataset
        self.change = change
        self.seed = seed
        self.held_out = held_out

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item) -> dict[str, Any]:
        epoch, number, *_ = item
        sample, name = self.dataset[number], sample_name(item)
        if self.change:
            sample = self.change(sample, epoch, name)
        if self.held_out:
            return {**sample, **held_out_entries(number)}
        return sample if self.seed is None else {**sample, STREAM: stream_name(self.seed, epoch, name)}
