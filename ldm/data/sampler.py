"""Which samples make up each batch of an epoch: a function of seed and epoch alone, and an even share for each rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

Item = tuple[int, int]  # epoch and sample number: all that an item's randomness may depend on


def stream_name(seed: int, epoch: int, number: int | str) -> str:
    """The name of the random numbers of a sample in an epoch, whichever rank and batch it is in."""
    return f"{seed}/{epoch}/{number}"


def epoch_batches(
    groups: Sequence[np.ndarray],
    batch_size: int,
    *,
    epoch: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
) -> list[np.ndarray]:
    """The batches of sample numbers that `rank` of `world` sees in `epoch`. Samples of one group share batches.

    Each group is cut into steps of `batch_size * world` samples and each rank takes its part of every step, so the
    ranks together see what one process with that larger batch would see, and have the same number of batches. The
    last step is smaller (or left out, with `drop_last`) and spread evenly. Nothing is repeated; only what cannot give
    every rank one sample is left out.
    """
    rng = np.random.default_rng([seed, epoch])
    steps: list[np.ndarray] = []
    for group in groups:
        order = rng.permutation(group) if shuffle else np.asarray(group)
        steps += _steps(order, batch_size, world, drop_last)
    if shuffle and len(groups) > 1:
        steps = [steps[i] for i in rng.permutation(len(steps))]
    return [np.array_split(step, world)[rank] for step in steps]


def _steps(order: np.ndarray, batch_size: int, world: int, drop_last: bool) -> list[np.ndarray]:
    """The steps of one group's sample numbers, in their `order`."""
    size = batch_size * world
    cuts = list(range(size, len(order), size))
    tail = len(order) - (cuts[-1] if cuts else 0)
    if drop_last and tail < size:
        order = order[: len(order) - tail]
    elif cuts and tail < world and size + tail >= 2 * world:
        cuts[-1] -= world - tail  # the step before gives up what the last one lacks
    return [step for step in np.split(order, cuts) if len(step) >= world]


def samples_digest(groups: Sequence[np.ndarray], keys: Sequence[str]) -> str:
    """Twelve hex digits that tell which samples there are, in which order, and which of them share batches."""
    hashed = hashlib.sha256(json.dumps([[len(group) for group in groups], list(keys)]).encode())
    for group in groups:
        hashed.update(np.asarray(group, np.int64).tobytes())
    return hashed.hexdigest()[:12]


class EpochBatchSampler:
    """Batches of `(epoch, sample number)` for a DataLoader.

    `epoch` and `start` say where the next iteration begins, `handed` how many batches of the epoch were used.
    """

    def __init__(
        self, groups: Sequence[np.ndarray], batch_size: int, keys: Sequence[str] = (), **options: int | bool
    ) -> None:
        """`keys` are the samples' names, if they have any; `options` those of `epoch_batches`, without `epoch`."""
        self.data = samples_digest(groups, keys)
        self.groups = list(groups)
        self.batch_size = batch_size
        self.options = options
        self.epoch = 0
        self.start = 0
        self.handed = 0
        self._length = len(epoch_batches(self.groups, batch_size, **options))

    @property
    def sampler(self) -> EpochBatchSampler:
        """Itself: Lightning calls `batch_sampler.sampler.set_epoch` at the start of an epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`, or, where it is the present one, leave the position alone."""
        if epoch != self.epoch:
            self.epoch, self.start, self.handed = epoch, 0, 0

    def described(self) -> dict[str, int | bool | str]:
        """What must be the same for a position to mean the same samples."""
        options = {key: value for key, value in self.options.items() if key != "rank"}
        return {
            "samples": sum(map(len, self.groups)),
            "data": self.data,
            "batch_size": self.batch_size,
            **options,
        }

    def never_seen(self) -> list[int]:
        """How many samples of each group are in no epoch at all.

        Shuffled, what one epoch leaves out another has, but for groups that do not make a single step.
        """
        drop_last, world = self.options.get("drop_last", False), self.options.get("world", 1)
        missing = []
        for group in self.groups:
            seen = sum(map(len, _steps(group, self.batch_size, world, drop_last)))
            missing.append(0 if self.options.get("shuffle") and seen else len(group) - seen)
        return missing

    def __len__(self) -> int:
        """Batches in a whole epoch, which is the same for every epoch and rank."""
        return self._length

    def __iter__(self) -> Iterator[list[Item]]:
        batches = epoch_batches(self.groups, self.batch_size, epoch=self.epoch, **self.options)
        epoch = self.epoch
        for batch in batches[self.start :]:
            yield [(epoch, number) for number in batch.tolist()]
