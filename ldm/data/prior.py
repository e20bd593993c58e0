"""Prior set for prior preservation, whose samples follow the training samples in each batch.

These are the class images of DreamBooth (arXiv:2208.12242, section 3.2). The prior is a separate set of shards with its
own cycle, independent of the epochs of the training set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.batch_sampler import EpochBatchSampler, Item, samples_digest, stream_name
from ldm.data.dropout import Change, EpochItems
from ldm.shards.index import TEACHER_POWER, read_index
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import (
    IS_PRIOR,
    LEAST_LOGVAR,
    LOSS_MASK,
    NOISE,
    PREDICTION,
    STREAM,
    TEACHER_KEYS,
    TIMESTEPS,
    plain,
)
from ldm.util import UserError, refuse_if

# Settings that define a stored prediction: attributes of the model, and keys of index.json.
_MEANING = ("scale_factor", "parameterization")


def check_prior(training: Any, prior: ShardDataset) -> None:
    """Raise `UserError` unless samples of both sets can share a batch and the teacher members have matching shapes."""
    refuse_if(
        not isinstance(training, ShardDataset),
        "data.params.prior_urls needs training shards in local files, but training_urls are streams",
    )
    first, where = training.first_stage_key, f"prior_urls, such as {prior.paths[0]}"
    sizes, others = ({shape[1:] for shape in dataset.shapes[first]} for dataset in (training, prior))
    if len(sizes) > 1 or sizes != others:
        named = [", ".join(f"{h}x{w}" for h, w in sorted(found)) for found in (others, sizes)]
        raise UserError(
            f"{where}: {first} has sizes {named[0]}, but {named[1]} in the training set; both must have one size"
        )
    (own, *_), (other, *_) = (next(iter(dataset.shapes[first])) for dataset in (training, prior))
    refuse_if(
        own != other and max(own, other) != 2 * min(own, other),
        f"{where}: {first} has {other} channels, but {own} in the training set",
    )
    for key in training.keys:
        if plain(key) != key or key in TEACHER_KEYS:  # the sets may differ in their number of masks and predictions
            continue
        ours, theirs = training.shapes[key].keys(), prior.shapes.get(key, {}).keys()
        if key not in (first, LOSS_MASK) and ours != theirs:
            raise UserError(
                f"{where}: {key} has shape {next(iter(theirs))}, but {next(iter(ours))} in the training set"
            )
    check_predictions(prior, where)


def check_predictions(dataset: ShardDataset, where: str) -> None:
    """Raise `UserError` if a teacher's members in `dataset`, named by `where`, have other shapes than its latents."""
    if TIMESTEPS not in dataset.keys:
        return
    first = dataset.first_stage_key
    shapes = {key: next(iter(dataset.shapes[key])) for key in (first, *TEACHER_KEYS)}
    fitting = (shapes[TIMESTEPS][0], *shapes[first])
    refuse_if(
        len(shapes[TIMESTEPS]) != 1 or not shapes[NOISE] == shapes[PREDICTION] == fitting,
        f"{where}: shapes of the teacher do not match: {shapes}; write the set again with tools/make_prior.py",
    )


def check_taught(training: Any) -> None:
    """Raise `UserError` unless each sample of a training set has one latent and one caption, which a teacher saw."""
    refuse_if(
        not isinstance(training, ShardDataset),
        "loss_config: DirectConsistency needs training shards in local files, not streams",
    )
    for several, what in (("captions", "has_several_captions"), ("variants of each image", "has_several_variants")):
        if getattr(training, what):
            raise UserError(
                f"{training.paths[0].parent}: the set has several {several}, but a stored prediction is of the first; "
                "encode a set with one for DirectConsistency"
            )


def check_teacher(prior: ShardDataset, model: Any) -> None:
    """Raise `UserError` if a set or its index does not fit `model` for stored predictions.

    Missing indexes and entries are not compared.
    """
    check_predictions(prior, str(prior.paths[0]))
    for folder in dict.fromkeys(path.parent for path in prior.paths):
        index = read_index(folder) or {}
        for key in _MEANING:
            asked, ours = index.get(key), getattr(model, key, None)
            if asked is None or not isinstance(ours, (int, float, str)):
                continue  # a scale from the first batch is a tensor, and not known yet
            both_numbers = isinstance(asked, (int, float)) and isinstance(ours, (int, float))
            refuse_if(
                not (math.isclose(asked, ours, rel_tol=1e-4) if both_numbers else asked == ours),
                f"{folder}: the teacher's {key} is {asked}, the model's {ours}; "
                "make the set anew with tools/make_prior.py, from the release that training begins from",
            )
        _check_timesteps(folder, float(index.get(TEACHER_POWER, 0)), model)


def _check_timesteps(folder: Path, stored: float, model: Any) -> None:
    """Raise `UserError` unless the density of `stored` timesteps is that of the model's prior samples."""
    asked = float(getattr(getattr(model, "timestep_distribution", None), "power", 0))
    if stored != asked:
        given = f"--teacher-power {asked:g}" if asked else "no --teacher-power"
        raise UserError(
            f"{folder}: the teacher's timesteps have the power {stored:g}, but timestep_config has {asked:g}; make the "
            f"set anew with {given}, or set model.params.timestep_config to match it"
        )


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, samples: int) -> np.ndarray:
    """Return the sample numbers of the prior in the order of its cycle `turn`."""
    return np.random.default_rng([seed, turn, 1]).permutation(samples)  # the training set uses [seed, epoch]


class PriorBatchSampler(EpochBatchSampler):
    """Sampler that adds round(batch_size · ratio) prior samples to each batch of `sampler`.

    Prior samples are numbered after the training samples. Their item has the cycle of the prior in place of the epoch.
    They follow an endless sequence of permutations. Epoch, batch and rank determine the position in it, so that a
    resumed run needs no further state.

    Raises:
        UserError: `ratio` gives less than one sample per batch.
    """

    def __init__(self, sampler: EpochBatchSampler, samples: int, ratio: float, keys: Sequence[str] = ()) -> None:
        """Store the settings. `keys` are the names of the prior's `samples`, if they have names."""
        super().__init__(sampler.groups, sampler.batch_size, weights=sampler.weights, **sampler.options)
        self.data = sampler.data
        self.samples = samples
        self.prior_data = samples_digest([np.arange(samples)], keys)
        self.count = round(self.batch_size * ratio)
        refuse_if(
            self.count < 1,
            f"data.params.prior_ratio {ratio}: gives no prior sample for batch_size {self.batch_size}; raise it",
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


def one_prediction(sample: dict[str, Any], which: int, timesteps: int | None, dataset: ShardDataset) -> dict[str, Any]:
    """Return timestep, noise and prediction number `which` modulo K of a sample of `dataset`.

    Raises:
        UserError: the timestep is not below `timesteps`.
    """
    asked = sample[TIMESTEPS].tolist()
    which %= len(asked)
    if asked[which] < 0 or (timesteps and asked[which] >= timesteps):
        where = f"{dataset.paths[0].parent}: sample {sample['__key__']!r}"
        most = f" to {timesteps - 1}" if timesteps else " or above"
        raise UserError(f"{where}: {TIMESTEPS} is {asked[which]}; it must be a timestep of the model, 0{most}")
    return {TIMESTEPS: asked[which], **{key: sample[key][which] for key in (NOISE, PREDICTION)}}


class WithPredictions(EpochItems):
    """Training samples with one of their K stored predictions of a teacher, the next one in each epoch."""

    def __init__(self, items: EpochItems, timesteps: int | None) -> None:
        super().__init__(items.dataset, items.change, items.seed, items.held_out)
        self.timesteps = timesteps

    def __getitem__(self, item: Item) -> dict[str, Any]:
        sample, (epoch, number, *_) = super().__getitem__(item), item
        return sample | one_prediction(sample, epoch + number, self.timesteps, self.dataset)


class WithPrior(Dataset):
    """Dataset of the training samples, followed by the prior samples, with the entry `IS_PRIOR`.

    All samples have the same entries, dtypes and shapes. If one set has posteriors and the other latents, the latents
    become posteriors with zero variance. If the prior has predictions of a teacher, a prior sample has one of its K
    predictions, the next one in each cycle, and training samples have zeros. Prior samples are trained as a whole, with
    loss masks of 1.
    """

    def __init__(self, training: EpochItems, prior: ShardDataset, change: Change | None, timesteps: int | None) -> None:
        """Store the sets. `change` applies to prior samples. Stored timesteps must be below `timesteps`."""
        self.training = training
        self.prior = prior
        self.has_teacher = TIMESTEPS in prior.keys
        self.change = change
        self.timesteps = timesteps
        own, other = training.dataset[0], prior[0]
        self._has_masks = LOSS_MASK in own
        self._types = {
            key: value.dtype
            for key, value in own.items()
            if isinstance(value, np.ndarray) and plain(key) == key and key not in TEACHER_KEYS
        }
        self._channels = max(sample[prior.first_stage_key].shape[-3] for sample in (own, other))
        taught = other if self.has_teacher else own
        nothing = {key: np.zeros_like(taught[key][0]) for key in (NOISE, PREDICTION) if key in taught}
        self._untaught = {TIMESTEPS: 0, **nothing} if nothing else {}

    def __len__(self) -> int:
        return len(self.training) + len(self.prior)

    def __getitem__(self, item: Item) -> dict[str, Any]:
        turn, number, *_ = item
        if number < len(self.training):
            return self._alike({**self._untaught, **self.training[item], IS_PRIOR: False})
        number -= len(self.training)
        sample = self.prior[number]
        if self.change:
            sample = self.change(sample, turn, f"prior/{number}")
        if self.has_teacher:
            sample |= one_prediction(sample, turn + number, self.timesteps, self.prior)
        if self._has_masks:
            sample[LOSS_MASK] = np.ones((1, *sample[self.prior.first_stage_key].shape[1:]), self._types[LOSS_MASK])
        if self.training.seed is not None:
            sample[STREAM] = stream_name(self.training.seed, turn, f"prior/{number}")
        return self._alike({**self._untaught, **sample, IS_PRIOR: True})

    def _alike(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return `sample` with the dtypes of the training set, and with a posterior if a set has posteriors."""
        sample |= {key: sample[key].astype(dtype, copy=False) for key, dtype in self._types.items()}
        latent = sample[self.prior.first_stage_key]
        if len(latent) < self._channels:
            no_spread = np.full_like(latent, LEAST_LOGVAR)  # standard deviation 3e-7
            sample[self.prior.first_stage_key] = np.concatenate([latent, no_spread])
        return sample
