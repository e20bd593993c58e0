"""Prior preservation's second set: in each batch, behind the training samples, some that are there to be remembered.

The class images of DreamBooth (arXiv:2208.12242, section 3.2): a set of shards of its own, which goes round and round
beside the training set's epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.dropout import Change, EpochItems
from ldm.data.sampler import EpochBatchSampler, Item, samples_digest, stream_name
from ldm.shards.index import read_index
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import IS_PRIOR, LEAST_LOGVAR, NOISE, PREDICTION, STREAM, TEACHER_KEYS, TIMESTEPS, plain
from ldm.util import UserError

# What a stored prediction depends on, beside the weights: attributes of the model, and keys of index.json.
_MEANING = ("scale_factor", "parameterization")


def check_prior(training: Any, prior: ShardDataset) -> None:
    """Raise `UserError` unless samples of both sets can share a batch, and the prior's teacher members fit together."""
    if not isinstance(training, ShardDataset):
        raise UserError("data.params.prior_urls needs training shards in local files, but training_urls are streams")
    first, where = training.first_stage_key, f"prior_urls, such as {prior.paths[0]}"
    sizes, others = ({shape[1:] for shape in dataset.shapes[first]} for dataset in (training, prior))
    if len(sizes) > 1 or sizes != others:
        named = [", ".join(f"{h}x{w}" for h, w in sorted(found)) for found in (others, sizes)]
        raise UserError(f"{where}: {first} of {named[0]}, the training set's are {named[1]}; both must have one size")
    (own, *_), (other, *_) = (next(iter(dataset.shapes[first])) for dataset in (training, prior))
    if own != other and max(own, other) != 2 * min(own, other):
        raise UserError(f"{where}: {first} has {other} channels, the training set's has {own}")
    for key in filter(lambda key: plain(key) == key, training.keys):  # the sets may differ in their number of masks
        ours, theirs = training.shapes[key].keys(), prior.shapes[key].keys()
        if key != first and ours != theirs:
            raise UserError(f"{where}: {key} has shape {next(iter(theirs))}, the training set's {next(iter(ours))}")
    if TIMESTEPS not in prior.keys:
        return
    shapes = {key: next(iter(prior.shapes[key])) for key in (first, *TEACHER_KEYS)}
    fitting = (shapes[TIMESTEPS][0], *shapes[first])
    if len(shapes[TIMESTEPS]) != 1 or not shapes[NOISE] == shapes[PREDICTION] == fitting:
        raise UserError(f"{where}: shapes do not fit together: {shapes}; make the set anew with tools/make_prior.py")


def check_teacher(prior: ShardDataset, model: Any) -> None:
    """Raise `UserError` if a set's index says that its predictions are those of a model with another meaning of them.

    Sets without an index, or of one that does not say it, are taken as they are.
    """
    for folder in dict.fromkeys(path.parent for path in prior.paths):
        index = read_index(folder) or {}
        for key in _MEANING:
            asked, ours = index.get(key), getattr(model, key, None)
            if asked is None or not isinstance(ours, (int, float, str)):
                continue  # a scale that is set from the first batch is a tensor, and not known yet
            both_numbers = isinstance(asked, (int, float)) and isinstance(ours, (int, float))
            if not (math.isclose(asked, ours, rel_tol=1e-4) if both_numbers else asked == ours):
                raise UserError(
                    f"{folder}: the teacher's {key} is {asked}, the model's {ours}; "
                    "make the set anew with tools/make_prior.py, from the release that training begins from"
                )


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, samples: int) -> np.ndarray:
    """The prior's sample numbers in the order of its turn `turn`."""
    return np.random.default_rng([seed, turn, 1]).permutation(samples)  # without the 1, the training set's of an epoch


class PriorBatchSampler(EpochBatchSampler):
    """The batches of `sampler`, each with round(batch_size · ratio) numbers of the prior's `samples` behind its own.

    The prior's numbers count on from the training set's, and come with the turn that the prior is in, not the epoch.
    They are taken off an endless row of permutations at the place that epoch and batch give: ranks share it out, and
    a resumed run goes on in it, with nothing else to save.

    Raises:
        UserError: the ratio is no positive number, or too small for one sample a batch.
    """

    def __init__(self, sampler: EpochBatchSampler, samples: int, ratio: float, keys: Sequence[str] = ()) -> None:
        """`keys` are the names of the prior's `samples`, if they have any."""
        super().__init__(sampler.groups, sampler.batch_size, **sampler.options)
        self.data = sampler.data
        self.samples = samples
        self.prior_data = samples_digest([np.arange(samples)], keys)
        self.count = round(self.batch_size * ratio)
        if self.count < 1:
            raise UserError(
                f"data.params.prior_ratio {ratio}: no prior sample beside a batch_size of {self.batch_size}"
            )

    def described(self) -> dict[str, int | bool | str]:
        own = {"prior_samples": self.samples, "prior_batch_size": self.count, "prior_data": self.prior_data}
        return {**super().described(), **own}

    def __iter__(self) -> Iterator[list[Item]]:
        step = self.epoch * len(self) + self.start
        for batch in super().__iter__():
            yield batch + self._prior_items(step)
            step += 1

    def _prior_items(self, step: int) -> list[Item]:
        first, seed = sum(map(len, self.groups)), self.options.get("seed", 0)
        begin = (step * self.options.get("world", 1) + self.options.get("rank", 0)) * self.count
        places = (divmod(place, self.samples) for place in range(begin, begin + self.count))
        return [(turn, first + int(_order(seed, turn, self.samples)[place])) for turn, place in places]


class WithPrior(Dataset):
    """The training samples and, numbered on from them, the prior's; the entry `IS_PRIOR` tells them apart.

    All have the same entries of the same types and shapes: where one set holds posteriors and the other latents, the
    latents become posteriors without spread. Where the prior holds a teacher's predictions, a sample gives one of its
    K, the next one in each turn, and training samples give zeros.
    """

    def __init__(self, training: EpochItems, prior: ShardDataset, change: Change | None, timesteps: int | None) -> None:
        """`change` is made to the prior's samples. The stored timesteps are checked against the model's `timesteps`."""
        self.training = training
        self.prior = prior
        self.has_teacher = TIMESTEPS in prior.keys
        self.change = change
        self.timesteps = timesteps
        own, other = training.dataset[0], prior[0]
        self._types = {
            key: value.dtype for key, value in own.items() if isinstance(value, np.ndarray) and plain(key) == key
        }
        self._channels = max(len(sample[prior.first_stage_key]) for sample in (own, other))
        nothing = {key: np.zeros_like(other[key][0]) for key in (NOISE, PREDICTION)} if self.has_teacher else {}
        self._untaught = {TIMESTEPS: 0, **nothing} if self.has_teacher else {}

    def __len__(self) -> int:
        return len(self.training) + len(self.prior)

    def __getitem__(self, item: Item) -> dict[str, Any]:
        turn, number = item
        if number < len(self.training):
            return self._alike({**self.training[item], **self._untaught, IS_PRIOR: False})
        number -= len(self.training)
        sample = self.prior[number]
        if self.change:
            sample = self.change(sample, turn, f"prior/{number}")
        if self.has_teacher:
            sample |= self._one_of(sample, turn + number)
        if self.training.seed is not None:
            sample[STREAM] = stream_name(self.training.seed, turn, f"prior/{number}")
        return self._alike({**sample, IS_PRIOR: True})

    def _one_of(self, sample: dict[str, Any], which: int) -> dict[str, Any]:
        """What the teacher was asked and said the time `which`, counted modulo K."""
        asked = sample[TIMESTEPS].tolist()
        which %= len(asked)
        if asked[which] < 0 or (self.timesteps and asked[which] >= self.timesteps):
            where = f"{self.prior.paths[0].parent}: sample {sample['__key__']!r}"
            raise UserError(f"{where}: {TIMESTEPS} is {asked[which]}, the model's are 0 to {self.timesteps} - 1")
        return {TIMESTEPS: asked[which], **{key: sample[key][which] for key in (NOISE, PREDICTION)}}

    def _alike(self, sample: dict[str, Any]) -> dict[str, Any]:
        """`sample` with arrays of the training set's types, and a posterior if there are any."""
        sample |= {key: sample[key].astype(dtype, copy=False) for key, dtype in self._types.items()}
        latent = sample[self.prior.first_stage_key]
        if len(latent) < self._channels:
            no_spread = np.full_like(latent, LEAST_LOGVAR)  # a standard deviation of 3e-7
            sample[self.prior.first_stage_key] = np.concatenate([latent, no_spread])
        return sample
