"""Dropping captions for classifier-free guidance (arXiv:2207.12598): now and then, the empty caption is taught."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.sampler import Item, stream_name
from ldm.files import MOST_IN_MEMBER, check_file, read_at_most
from ldm.shards import npy
from ldm.shards.sample import CAPTION, STREAM
from ldm.util import UserError


def load_null(path: Path) -> np.ndarray:
    """The stored encoding of the empty caption.

    Raises:
        UserError: the file is missing, broken, not finite, or all zeros, which no text encoder gives.
    """
    check_file(path)
    if not path.exists():
        raise UserError(
            f"{path}: not found, and null_cond_dropout needs it: the text encoder's output for the empty caption; "
            "tools/preencode.py writes it beside the shards, null_cond_path names another place"
        )
    null = npy.decode(bytearray(read_at_most(path, MOST_IN_MEMBER)), str(path))
    if not np.isfinite(null).all() or not null.any():
        raise UserError(f"{path}: is not the encoding of an empty caption: it is all zeros or not finite")
    return null


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


class EpochItems(Dataset):
    """A map-style dataset asked for `(epoch, number)`, with the captions dropped that this epoch drops.

    With `seed`, each sample has the entry `STREAM`, which names the random numbers that the training draws for it.
    """

    def __init__(self, dataset: Dataset, dropout: CaptionDropout | None = None, seed: int | None = None) -> None:
        self.dataset = dataset
        self.dropout = dropout
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Item) -> dict[str, Any]:
        epoch, number = item
        sample = self.dataset[number]
        if self.dropout:
            sample = self.dropout(sample, epoch, number)
        return sample if self.seed is None else {**sample, STREAM: stream_name(self.seed, epoch, number)}
