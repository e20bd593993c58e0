"""Choice among the stored masks of a sample, for inpainting.

Pre-encoding stores a few masks per sample and the encoded masked images. Training chooses one of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ldm.data.dropout import read_array
from ldm.remote.path import ShardPath
from ldm.shards.sample import MASK, MASKED_IMAGE, NUMBERED, blank_key, null_path, numbered, plain
from ldm.util import refuse_if

_NEEDED = (
    "full_mask_share needs it: the encoding of a completely masked image; tools/preencode.py writes it beside the "
    "shards, and data.params.full_mask_share=0 does not need it"
)


class MaskChoice:
    """Choice of one of a sample's masks and its masked image, seeded by (seed, epoch, sample).

    Args:
        count: number of masks per sample.
        blanks: completely masked `MASKED_IMAGE` by height and width of the latent.
        full: probability of a completely masked image.
        seed: None always chooses the first mask, for validation.
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


def load_blanks(folder: ShardPath, shapes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
    """Return the stored completely masked images for masked images of `shapes`, by height and width.

    Raises:
        UserError: a file beside the shards in `folder` is missing or damaged, or has another shape.
    """
    blanks = {}
    for shape in shapes:
        path = null_path(folder, blank_key(*shape[1:]))
        blank = read_array(path, _NEEDED)
        refuse_if(
            blank.shape != shape,
            f"{path}: shape {blank.shape}, but {MASKED_IMAGE} in the shards has {shape}; encode the set again with "
            "tools/preencode.py --overwrite",
        )
        blanks[shape[1:]] = blank
    return blanks
