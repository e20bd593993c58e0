"""Named sets of pre-encoded images for an evaluation."""

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
from ldm.util import UserError, check_number, located, refuse_if

_CAPTIONED = ("crossattn", "crossattn-adm", "hybrid", "hybrid-adm")  # kinds of conditioning with captions
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def parse_sets(entries: Iterable[str]) -> dict[str, str]:
    """Parse `NAME=SHARDS` entries into a mapping.

    Raises:
        UserError: an entry has another form, or a name is given twice.
    """
    sets: dict[str, str] = {}
    for entry in entries:
        name, equals, pattern = entry.partition("=")
        refuse_if(
            not (equals and pattern and _NAME.fullmatch(name)),
            f"--set {entry}: give NAME=SHARDS, such as new=shards/cats-000000.tar",
        )
        refuse_if(name in sets, f"--set {entry}: the name {name!r} is given twice")
        sets[name] = pattern
    return sets


def conditioning_members(model: LatentDiffusion) -> list[str]:
    """Return the members of a sample that condition `model`: the caption or its embedding, then sizes and maps.

    A model with a text encoder encodes the caption itself, because training may have changed the encoder. A model
    without one takes the stored caption embedding.

    Raises:
        UserError: the model is not conditioned on text.
    """
    kind, stage = model.model.conditioning_key, model.cond_stage_model
    only = "only models conditioned on captions can be evaluated"
    refuse_if(kind not in _CAPTIONED, f"conditioning_key {kind!r}: {only}")
    refuse_if(stage is None, f"the model has no cond_stage_config: {only}")
    maps = model.concat_keys if model.model.takes_maps else ()
    readers = getattr(stage, "caption_embedders", None)
    if readers or (readers is None and getattr(stage, "key", None) is None):
        return [CAPTION, *getattr(stage, "other_keys", ()), *maps]
    return list(model.conditioning_entries)


@dataclass(frozen=True)
class EvaluationSet:
    """Samples `numbers` of `dataset`. The position of an image is its index in `numbers`."""

    name: str
    dataset: ShardDataset
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.dataset[int(self.numbers[position])]

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, by position."""
        return [self.dataset.sample_keys[number] for number in self.numbers]

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """Yield all positions in batches of at most `batch_size`; the images of a batch have one size."""
        for group in self.dataset.groups():
            positions = np.flatnonzero(np.isin(self.numbers, group)).tolist()
            for start in range(0, len(positions), batch_size):
                yield positions[start : start + batch_size]

    def digest(self, timesteps: Sequence[int]) -> bytes:
        """Return a digest (32 bytes) of the samples' keys and the timesteps."""
        return hashlib.sha256(repr((self.keys, list(timesteps))).encode()).digest()


def open_set(
    name: str, urls: str | Sequence[str], model: LatentDiffusion, limit: int | None = None, verify: bool = True
) -> EvaluationSet:
    """Open the shards `urls` as a set of at most `limit` images, and check its shapes against `model`.

    The images are spread over the shards. `verify` is passed to `open_shards`.

    Raises:
        UserError: the shards are missing, damaged, streamed or empty, or do not fit the model. The message names the
            set.
    """
    refuse_if(
        not (isinstance(name, str) and _NAME.fullmatch(name)),
        f"set {name!r}: a name consists of letters, digits, _ and -; put quotes around a number",
    )
    if not isinstance(urls, (str, Sequence)):
        raise UserError(f"set {name!r}: {urls!r} names no shards; give a pattern such as shards/cats-*.tar")
    check_number("limit", limit, least=1, optional=True)
    first, *others = conditioning_members(model)
    with located(f"set {name!r}"):
        dataset = open_shards(urls, LATENT, first, others, verify=verify)
        shapes = {key: next(iter(found)) for key, found in dataset.shapes.items() if found and key != LATENT}
        for latent in dataset.shapes[LATENT]:
            model.check_batch_shapes({**shapes, model.first_stage_key: latent})
    return EvaluationSet(name, dataset, spread(len(dataset), limit))
