"""Choice among the stored masks of a sample, for inpainting.

A masked image goes through the autoencoder when the shards are made, so training chooses among a few masks per sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.dropout import read_array
from ldm.shards.sample import MASK, MASKED_IMAGE, NUMBERED, blank_key, null_path, numbered, plain
from ldm.util import UserError

_NEEDED = (
    "full_mask_share needs it: the masked image of which nothing is seen; tools/preencode.py writes it beside the "
    "shards, data.params.full_mask_share=0 does without"
)


class MaskChoice:
    """Keeps one of a sample's masks with its masked image, chosen by (seed, epoch, sample).

    Args:
        count: masks of a sample.
        blanks: by height and width of a latent, `MASKED_IMAGE` where all of the image is masked.
        full: probability of that.
        seed: None keeps the first mask always, as for validation.
    """

    def __init__(
        self,
        count: int,
        blanks: Mapping[tuple[int, ...], np.ndarray] | None = None,
        full: float = 0.0,
        seed: int | None = None,
    ) -> None:
        self.count = count
        self.blanks = blanks or {}
        self.full = full
        self.seed = seed

    def __call__(self, sample: dict[str, Any], epoch: int, number: int | str) -> dict[str, Any]:
        draws = random.Random(f"{self.seed}/{epoch}/{number}/{MASK}")
        is_full, which = draws.random() < self.full, draws.randrange(self.count)
        which = 0 if self.seed is None else which
        chosen = {key: sample[numbered(key, which)] for key in NUMBERED}
        if is_full:
            blank = self.blanks[chosen[MASK].shape[1:]]
            chosen = {MASK: np.ones_like(chosen[MASK]), MASKED_IMAGE: blank.astype(chosen[MASKED_IMAGE].dtype)}
        return {**{key: value for key, value in sample.items() if plain(key) not in NUMBERED}, **chosen}


def load_blanks(folder: Path, shapes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
    """Return the stored masked images of which nothing is seen, by height and width, for masked images of `shapes`.

    Raises:
        UserError: a file beside the shards in `folder` is missing, broken, or of another shape.
    """
    blanks = {}
    for shape in shapes:
        path = null_path(folder, blank_key(*shape[1:]))
        blank = read_array(path, _NEEDED)
        if blank.shape != shape:
            raise UserError(f"{path}: shape {blank.shape}, but the shards' {MASKED_IMAGE} is {shape}")
        blanks[shape[1:]] = blank
    return blanks
