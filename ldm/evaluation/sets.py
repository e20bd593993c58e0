"""A named set of pre-encoded pictures to evaluate on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.evaluation.protocol import spread
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.shards.open import open_shards
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CAPTION, LATENT
from ldm.util import UserError, check_number

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def parse_sets(entries: Iterable[str]) -> dict[str, str]:
    """`NAME=SHARDS` entries as a mapping.

    Raises:
        UserError: an entry has another form, or a name comes twice.
    """
    sets: dict[str, str] = {}
    for entry in entries:
        name, equals, pattern = entry.partition("=")
        if not (equals and pattern and _NAME.fullmatch(name)):
            raise UserError(f"--set {entry}: give NAME=SHARDS, such as new=shards/cats-000000.tar")
        if name in sets:
            raise UserError(f"--set {entry}: the name {name!r} is given twice")
        sets[name] = pattern
    return sets


def conditioning_member(model: LatentDiffusion) -> str:
    """The member of a sample that `model` is conditioned on: its caption where the model has a text encoder.

    Each model reads captions with its own encoder, which training may have changed; a model without one takes the
    stored encodings.

    Raises:
        UserError: the model is conditioned on something else than text.
    """
    if model.model.conditioning_key != "crossattn" or model.cond_stage_model is None:
        raise UserError(f"conditioning_key {model.model.conditioning_key!r}: only models of captions are evaluated")
    return getattr(model.cond_stage_model, "key", None) or CAPTION


@dataclass(frozen=True)
class EvaluationSet:
    """The samples `numbers` of `dataset`; a picture's position is that in `numbers`."""

    name: str
    dataset: ShardDataset
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.dataset[int(self.numbers[position])]

    @property
    def keys(self) -> list[str]:
        """The samples' keys."""
        return [self.dataset.sample_keys[number] for number in self.numbers]

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """All positions, at most `batch_size` at a time; the pictures of a batch have one size."""
        for group in self.dataset.groups():
            positions = np.flatnonzero(np.isin(self.numbers, group)).tolist()
            for start in range(0, len(positions), batch_size):
                yield positions[start : start + batch_size]

    def digest(self, timesteps: Sequence[int]) -> bytes:
        """What tells evaluations of other pictures, or at other timesteps, apart from this one; 32 bytes."""
        return hashlib.sha256(repr((self.keys, list(timesteps))).encode()).digest()


def open_set(
    name: str, urls: str | Sequence[str], model: LatentDiffusion, limit: int | None = None, verify: bool = True
) -> EvaluationSet:
    """The set of the shards `urls`, at most `limit` pictures spread over it, checked against `model`.

    `verify` is that of `open_shards`.

    Raises:
        UserError: the shards are missing, damaged, streamed or empty, or do not fit the model; names the set.
    """
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise UserError(f"set {name!r}: a name is letters, digits, _ and -; quote one of digits alone")
    if not isinstance(urls, (str, Sequence)):
        raise UserError(f"set {name!r}: {urls!r} names no shards")
    check_number("limit", limit, least=1, optional=True)
    member = conditioning_member(model)
    try:
        dataset = open_shards(urls, LATENT, member, verify=verify)
        for latent in dataset.shapes[LATENT]:
            for context in dataset.shapes.get(member) or [None]:
                shapes = {model.first_stage_key: latent, model.cond_stage_key: context}
                model.check_batch_shapes({key: shape for key, shape in shapes.items() if shape is not None})
    except UserError as error:
        raise UserError(f"set {name!r}: {error}") from error
    return EvaluationSet(name, dataset, spread(len(dataset), limit))
