"""Batches of an epoch, as a function of seed and epoch, with an equal share for each rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from ldm.shards.sample import QUANTILE, STREAM

_GOLDEN = (5**0.5 - 1) / 2
Item = tuple[int, int]  # epoch and sample number, which determine the randomness of the sample


def stream_name(seed: int, epoch: int, number: int | str) -> str:
    """Return the name of a sample's random stream in an epoch. It does not depend on rank and batch."""
    return f"{seed}/{epoch}/{number}"


def held_out_entries(number: int) -> dict[str, str | np.float32]:
    """Return the entries that fix the noise and the timestep of the held-out sample `number`.

    The timesteps of a set follow the multiples of the golden ratio, whose fractions are spread evenly for any number of
    samples (H. Weyl, "Über die Gleichverteilung von Zahlen mod. Eins", 1916).
    """
    return {STREAM: f"held-out/{number}", QUANTILE: np.float32((0.5 + number * _GOLDEN) % 1)}


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
    """Return the batches of sample numbers for `rank` of `world` in `epoch`. A batch has samples of one group.

    Each group is divided into steps of `batch_size * world` samples, and each rank takes its part of each step. All
    ranks have the same number of batches, and together see the batches of one process with the larger batch size. The
    last step is smaller and divided evenly, or dropped with `drop_last`. No sample is repeated. Samples are unused only
    if a step has fewer samples than ranks.
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
    """Return the steps of one group of sample numbers in their `order`."""
    size = batch_size * world
    cuts = list(range(size, len(order), size))
    tail = len(order) - (cuts[-1] if cuts else 0)
    if drop_last and tail < size:
        order = order[: len(order) - tail]
    elif cuts and tail < world and size + tail >= 2 * world:
        cuts[-1] -= world - tail  # the previous step gives samples to the last one
    return [step for step in np.split(order, cuts) if len(step) >= world]


def samples_digest(groups: Sequence[np.ndarray], keys: Sequence[str]) -> str:
    """Return a digest of 12 hex digits of the samples, their order and their groups."""
    hashed = hashlib.sha256(json.dumps([[len(group) for group in groups], list(keys)]).encode())
    for group in groups:
        hashed.update(np.asarray(group, np.int64).tobytes())
    return hashed.hexdigest()[:12]


class EpochBatchSampler:
    """Batch sampler of (epoch, sample number) for a DataLoader.

    `epoch` and `start` are the position of the next iteration. `handed` counts the delivered batches of the epoch.
    """

    def __init__(
        self, groups: Sequence[np.ndarray], batch_size: int, keys: Sequence[str] = (), **options: int | bool
    ) -> None:
        """Store the settings. `keys` are the names of the samples. `options` are those of `epoch_batches`."""
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
        """This object, because Lightning calls `batch_sampler.sampler.set_epoch` at the start of an epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`. In the current epoch, keep the position."""
        if epoch != self.epoch:
            self.epoch, self.start, self.handed = epoch, 0, 0

    def described(self) -> dict[str, int | bool | str]:
        """Return the settings that determine the samples at a position."""
        options = {key: value for key, value in self.options.items() if key != "rank"}
        return {
            "samples": sum(map(len, self.groups)),
            "data": self.data,
            "batch_size": self.batch_size,
            **options,
        }

    def never_seen(self) -> list[int]:
        """Return the number of samples per group that no epoch has.

        With shuffling, these are only the groups that do not fill a step.
        """
        drop_last, world = self.options.get("drop_last", False), self.options.get("world", 1)
        missing = []
        for group in self.groups:
            seen = sum(map(len, _steps(group, self.batch_size, world, drop_last)))
            missing.append(0 if self.options.get("shuffle") and seen else len(group) - seen)
        return missing

    def __len__(self) -> int:
        """Return the number of batches of an epoch, equal for all epochs and ranks."""
        return self._length

    def __iter__(self) -> Iterator[list[Item]]:
        batches = epoch_batches(self.groups, self.batch_size, epoch=self.epoch, **self.options)
        epoch = self.epoch
        for batch in batches[self.start :]:
            yield [(epoch, number) for number in batch.tolist()]
