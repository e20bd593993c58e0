"""Dropping of conditioning for classifier-free guidance (arXiv:2207.12598): at times, the empty caption is taught."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.sampler import Item, stream_name
from ldm.files import MOST_IN_MEMBER, check_file, read_at_most
from ldm.shards import npy
from ldm.shards.index import EMPTY_CAPTION, ZEROS, read_index
from ldm.shards.sample import CAPTION, EDIT, STREAM
from ldm.util import UserError

# Takes a sample, the epoch, and the sample's number or name; returns the sample as training sees it then.
Change = Callable[[dict[str, Any], int, int | str], dict[str, Any]]


def load_null(path: Path) -> np.ndarray:
    """Return the stored encoding of the empty caption.

    Raises:
        UserError: the file is missing, broken, not finite, or all zeros, which no text encoder gives; except where the
            index beside it says that zeros stand for the empty caption.
    """
    null = read_array(
        path,
        "null_cond_dropout needs it: the text encoder's output for the empty caption; tools/preencode.py writes it "
        "beside the shards, null_cond_path names another place",
    )
    if not null.any() and (read_index(path.parent) or {}).get(EMPTY_CAPTION) != ZEROS:
        raise UserError(f"{path}: is not the encoding of an empty caption: it is all zeros")
    return null


def read_array(path: Path, needed: str) -> np.ndarray:
    """Return the array in a file beside the shards; `needed` says who needs it, what it is, and how it is made.

    Raises:
        UserError: the file is missing, broken, or not finite.
    """
    check_file(path)
    if not path.exists():
        raise UserError(f"{path}: not found, and {needed}")
    array = npy.decode(bytearray(read_at_most(path, MOST_IN_MEMBER)), str(path))
    if not np.isfinite(array).all():
        raise UserError(f"{path}: holds NaN or infinite values; put back what was written there")
    return array


class CaptionDropout:
    """Puts `nulls` in place of a sample's encodings with a probability, by chance that (seed, epoch, sample) decide."""

    def __init__(self, nulls: Mapping[str, np.ndarray | str], probability: float, seed: int) -> None:
        self.nulls = nulls
        self.probability = probability
        self.seed = seed

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        if random.Random(f"{self.seed}/{epoch}/{number}").random() < self.probability:
            sample |= self.nulls
            sample[CAPTION] = ""
        return sample


class EditDropout(CaptionDropout):
    """Puts `nulls` in place of a sample's encodings, zeros in place of its image before the edit, or both.

    Each of the three comes with the same probability (arXiv:2211.09800, section 3.2.1).
    """

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        drawn, share = random.Random(f"{self.seed}/{epoch}/{number}").random(), self.probability
        if drawn < 2 * share:
            sample |= self.nulls
            sample[CAPTION] = ""
        if share <= drawn < 3 * share:
            sample[EDIT] = np.zeros_like(sample[EDIT])
        return sample


class InTurn:
    """Several changes, one after the other."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = list(changes)

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        for change in self.changes:
            sample = change(sample, epoch, number)
        return sample


class EpochItems(Dataset):
    """A map-style dataset asked for `(epoch, number)`, whose samples are as `change` makes them in that epoch.

    With `seed`, each sample has the entry `STREAM`, which names the random numbers that the training draws for it.
    """

    def __init__(self, dataset: Dataset, change: Change | None = None, seed: int | None = None) -> None:
        self.dataset = dataset
        self.change = change
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item) -> dict[str, Any]:
        epoch, number = item
        sample = self.dataset[number]
        if self.change:
            sample = self.change(sample, epoch, number)
        return sample if self.seed is None else {**sample, STREAM: stream_name(self.seed, epoch, number)}
