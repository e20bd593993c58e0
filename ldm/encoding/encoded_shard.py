"""Shard that is written while its images are encoded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldm.encoding.encoder import CaptionEncoding
from ldm.encoding.jobs import Record
from ldm.encoding.read import FittedImage, Unreadable
from ldm.shards.index import REPEATS
from ldm.shards.sample import LATENT, LOSS_MASK, encode_members, one_variant
from ldm.shards.writer import Shard
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)


class EncodedShard:
    """Writer of one shard that restores the order of the images and counts them.

    `prepare` is called once, before the file is opened and after the first encodings have passed their check. With
    `several`, encodings have a further dimension for the captions of an image.
    """

    def __init__(self, path: Path, prepare: Callable[[], None], several: bool = False) -> None:
        self.several = several
        self.path = path
        self.prepare = prepare
        self.failed: list[dict[str, str]] = []
        self.images = 0
        self.without_caption = 0
        self.without_mask = 0
        self.sizes: Counter[str] = Counter()
        self.shapes: set[tuple[int, ...]] = set()
        self._repeats: list[list[int]] = []  # pairs of repeats and the number of consecutive samples that have them
        self._cut: dict[int, dict[str, Any]] = {}  # names and tokens of truncated captions, by place
        self._shard: Shard | None = None
        self._early: dict[
            int, tuple[int, list[tuple[str, dict[str, bytes]]]]
        ] = {}  # repeats and samples by place, until those before them are written

    def skip_unreadable(self, results: Iterable[FittedImage | Unreadable]) -> Iterator[FittedImage]:
        """Yield the images among `results`. Log and record the others.

        Raises:
            UserError: a tar of images was replaced.
        """
        for result in results:
            if isinstance(result, FittedImage):
                yield result
                continue
            if result.is_fatal:
                raise UserError(result.reason)
            logger.warning("image skipped: %s", result.reason)
            self.failed.append({"name": result.item.name, "reason": result.reason})

    def add(
        self,
        batch: Sequence[tuple[int, FittedImage]],
        views: Sequence[Mapping[str, np.ndarray]],
        contexts: Sequence[CaptionEncoding],
    ) -> None:
        """Add a batch: `views` holds the arrays of its images by member and, with `--flip`, of their mirror images.

        `contexts` holds the encodings of all captions of all images.

        Raises:
            UserError: a value is not finite.
        """
        waiting = iter(contexts)
        for i, (place, image) in enumerate(batch):
            found = list(islice(waiting, len(image.captions)))
            context = CaptionEncoding(_arrays(found, self.several), max(one.cut_tokens for one in found))
            samples = [
                _sample(image, {key: values[i] for key, values in view.items()}, context, bool(flip))
                for flip, view in enumerate(views)
            ]
            self._early[place] = image.item.repeats, samples
            if context.cut_tokens:
                self._cut[place] = {"name": image.item.name, "tokens": context.cut_tokens}
            self.without_caption += image.item.caption is None
            self.without_mask += LOSS_MASK in views[0] and LOSS_MASK not in image.others
            self.sizes["{}x{}".format(*image.size)] += len(views)
            self.shapes.add(one_variant(views[0][LATENT].shape[1:]))
        if self._shard is None:
            self.prepare()
            self._shard = Shard(self.path).__enter__()
        while self.images in self._early:
            repeats, samples = self._early.pop(self.images)
            for key, members in samples:
                self._shard.write(key, members)
            if not self._repeats or self._repeats[-1][0] != repeats:
                self._repeats.append([repeats, 0])
            self._repeats[-1][1] += len(samples)
            self.images += 1

    def finish(self) -> Record:
        """Close the shard and return its record."""
        entry = {"samples": 0}
        if self._shard is not None:
            self._shard.__exit__(None, None, None)
            entry = self._shard.entry
        return {
            **entry,
            **({REPEATS: self._repeats} if any(repeats != 1 for repeats, _ in self._repeats) else {}),
            "images": self.images,
            "without_caption": self.without_caption,
            **({"without_mask": self.without_mask} if self.without_mask else {}),
            "failed": self.failed,
            "sizes": dict(sorted(self.sizes.items())),
            LATENT: sorted(self.shapes),
            **({"cut": [self._cut[place] for place in sorted(self._cut)]} if self._cut else {}),
        }

    def abandon(self, error: BaseException) -> None:
        """Remove the unfinished file."""
        if self._shard is not None:
            self._shard.__exit__(type(error), error, error.__traceback__)


def _arrays(found: Sequence[CaptionEncoding], several: bool) -> dict[str, np.ndarray]:
    """Return the encodings of an image's captions by member: of its only one, or (K, ...) of `several`."""
    if not several:
        return found[0].arrays
    return {member: np.stack([one.arrays[member] for one in found]) for member in found[0].arrays}


def _sample(
    image: FittedImage, arrays: dict[str, np.ndarray], context: CaptionEncoding, flip: bool
) -> tuple[str, dict[str, bytes]]:
    """Return key and members of the sample of the image, or with `flip` of its mirror image."""
    refuse_if(
        not all(np.isfinite(values).all() for values in arrays.values()),
        f"{image.item.name}: encodes to NaN or infinity; try --precision fp32",
    )
    members = encode_members(arrays.pop(LATENT), context.arrays, "\n".join(image.captions), image.origin(flip), arrays)
    return image.key + ("_flip" if flip else ""), members
