"""Batches of an epoch, as a function of seed and epoch, with an equal share for each rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np

from ldm.shards.sample import QUANTILE, STREAM

_GOLDEN = (5**0.5 - 1) / 2
# Epoch and sample number, which determine the randomness of the sample; and, from its second time in the epoch on, the
# number of earlier times.
Item = tuple[int, int] | tuple[int, int, int]


def stream_name(seed: int, epoch: int, number: int | str) -> str:
    """Return the name of a sample's random stream in an epoch. It does not depend on rank and batch."""
    return f"{seed}/{epoch}/{number}"


def held_out_entries(number: int) -> dict[str, str | np.float32]:
    """Return the entries that fix the noise and the timestep of the held-out sample `number`.

    The timesteps of a set follow the multiples of the golden ratio, whose fractions are spread evenly for any number of
    samples (H. Weyl, "Über die Gleichverteilung von Zahlen mod. Eins", 1916).
    """
    return {STREAM: f"held-out/{number}", QUANTILE: np.float32((0.5 + number * _GOLDEN) % 1)}


def sample_name(item: Item) -> int | str:
    """Return what names the sample of `item` in its epoch: the number, with `/1` at the second time and so on."""
    return item[1] if len(item) == 2 else f"{item[1]}/{item[2]}"


def repeated(group: np.ndarray, weights: np.ndarray, epoch: int, seed: int) -> np.ndarray:
    """Return the samples of a group in `epoch`: each as often as its weight, the number of times per epoch.

    `weights` has an entry for each sample of the set. Sample n is n + k N at its (k + 1)-th time, for N samples of the
    set. Of a weight of 2.3, the part 0.3 is 30 % of the samples of equal weight, at least one. These change from epoch
    to epoch, in a cycle through a random order, so that each sample has its share.
    """
    parts = []
    for weight in np.unique(weights[group]):
        equal, whole = group[weights[group] == weight], int(weight)
        parts += [equal + time * len(weights) for time in range(whole)]
        count = max(round((weight - whole) * len(equal)), int(weight > whole))
        order = np.random.default_rng([seed, len(group), 2]).permutation(equal)
        places = (epoch * count + np.arange(count)) % len(equal)
        parts.append(order[places] + whole * len(weights))
    return np.concatenate(parts)


def epoch_batches(
    groups: Sequence[np.ndarray],
    batch_size: int,
    *,
    weights: np.ndarray | None = None,
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
    last step is smaller and divided evenly, or dropped with `drop_last`. Only `weights` repeat samples; see `repeated`.
    Samples are unused only if a step has fewer samples than ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    steps: list[np.ndarray] = []
    for group in groups:
        group = group if weights is None else repeated(group, weights, epoch, seed)
        order = rng.permutation(group) if shuffle else np.asarray(group)
        steps += _steps(order, batch_size, world, drop_last)
    if shuffle and len(groups) > 1:
        steps = [steps[i] for i in rng.permutation(len(steps))]
    return steps if world == 1 else [_share(step, rank, world) for step in steps]


def _share(step: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Return `np.array_split(step, world)[rank]`, which takes ten times as long for each of a million steps."""
    each, more = divmod(len(step), world)
    start = rank * each + min(rank, more)
    return step[start : start + each + (rank < more)]


def _steps(order: np.ndarray, batch_size: int, world: int, drop_last: bool) -> list[np.ndarray]:
    """Return the steps of one group of sample numbers in their `order`."""
    size = batch_size * world
    cuts = list(range(size, len(order), size))
    tail = len(order) - (cuts[-1] if cuts else 0)
    if drop_last and tail < size:
        order = order[: len(order) - tail]
    elif cuts and tail < world and size + tail >= 2 * world:
        cuts[-1] -= world - tail  # the previous step gives samples to the last one
    places = zip([0, *cuts], [*cuts, len(order)], strict=True)
    return [order[start:end] for start, end in places if end - start >= world]  # np.split takes twice as long


def samples_digest(groups: Sequence[np.ndarray], keys: Sequence[str]) -> str:
    """Return a digest of 12 hex digits of the samples, their order and their groups."""
    # The text is that of json.dumps([lengths, keys]), but millions of keys are never one list.
    hashed = hashlib.sha256(f"[{json.dumps([len(group) for group in groups])}, [".encode())
    rest, separator = iter(keys), ""
    while part := list(islice(rest, 4096)):
        hashed.update(f"{separator}{json.dumps(part)[1:-1]}".encode())
        separator = ", "
    hashed.update(b"]]")
    for group in groups:
        hashed.update(np.asarray(group, np.int64).tobytes())
    return hashed.hexdigest()[:12]


class EpochBatchSampler:
    """Batch sampler of (epoch, sample number) for a DataLoader.

    `epoch` and `start` are the position of the next iteration. `handed` counts the delivered batches of the epoch.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        batch_size: int,
        keys: Sequence[str] = (),
        weights: np.ndarray | None = None,
        **options: int | bool,
    ) -> None:
        """Store the settings. `keys` are the names of the samples. `options` are those of `epoch_batches`."""
        self.data = samples_digest(groups, keys)
        self.groups = list(groups)
        self.batch_size = batch_size
        self.weights = weights
        self.options = options
        self.epoch = 0
        self.start = 0
        self.handed = 0
        self._length = len(self._batches())

    def _batches(self) -> list[np.ndarray]:
        return epoch_batches(self.groups, self.batch_size, weights=self.weights, epoch=self.epoch, **self.options)

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
        digest = "" if self.weights is None else hashlib.sha256(self.weights.tobytes()).hexdigest()[:12]
        return {
            "samples": sum(map(len, self.groups)),
            "data": self.data,
            "batch_size": self.batch_size,
            "weights": digest,
            **options,
        }

    def never_seen(self) -> list[int]:
        """Return the number of samples per group that no epoch has.

        With shuffling or weights, these are only the groups that do not fill a step.
        """
        changes = self.options.get("shuffle") or self.weights is not None
        missing = []
        for group, sizes in zip(self.groups, self._step_sizes(), strict=True):
            seen = sum(sizes)
            missing.append(0 if changes and seen else len(group) - seen)
        return missing

    def largest_step(self, batches: int) -> int:
        """Return the number of images in the `batches` largest batches of an epoch, of all ranks together."""
        return sum(sorted(chain.from_iterable(self._step_sizes()))[-batches:])

    def _step_sizes(self) -> list[list[int]]:
        """Return the number of images in each step of an epoch, by group. They are equal for all epochs."""
        drop_last, world = self.options.get("drop_last", False), self.options.get("world", 1)
        groups = [group if self.weights is None else repeated(group, self.weights, 0, 0) for group in self.groups]
        return [list(map(len, _steps(group, self.batch_size, world, drop_last))) for group in groups]

    def __len__(self) -> int:
        """Return the number of batches of an epoch, equal for all epochs and ranks."""
        return self._length

    def __iter__(self) -> Iterator[list[Item]]:
        epoch, count = self.epoch, None if self.weights is None else len(self.weights)
        for batch in self._batches()[self.start :]:
            yield [_item(epoch, number, count) for number in batch.tolist()]


def _item(epoch: int, number: int, count: int | None) -> Item:
    """Return the item of `number`, which is that of `repeated` for `count` samples if they have weights."""
    if count is None or number < count:
        return epoch, number
    return epoch, number % count, number // count
