"""Weights of samples: the number of times that an epoch has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from ldm.shards.index import INDEX, MAKE_AGAIN, REPEATS, read_index
from ldm.shards.reader import ShardDataset
from ldm.util import UserError

logger = logging.getLogger(__name__)


def sample_weights(dataset: ShardDataset, by_shard: Mapping[str, float], folder_repeats: bool) -> np.ndarray | None:
    """Return the weight of each sample, float64 (N,), or None if all are 1. Log the weights.

    Args:
        by_shard: weights of shards by path, 1 for those that are missing.
        folder_repeats: multiply them by the repeats of the images' folders, which the index of a set has.

    Raises:
        UserError: the repeats in an index do not match the shard.
    """
    given = np.array([by_shard.get(str(path), 1.0) for path in dataset.paths])
    weights = given[dataset.shard_numbers]
    if folder_repeats:
        weights = weights * _repeats(dataset)
    if (weights == 1).all():
        return None
    found, counts = np.unique(weights, return_counts=True)
    parts = ", ".join(f"{count} of weight {weight:g}" for weight, count in zip(found, counts, strict=True))
    logger.info("training data: samples %s; about %d per epoch", parts, round(weights.sum()))
    return weights


def _repeats(dataset: ShardDataset) -> np.ndarray:
    """Return the repeats of each sample of `dataset` by the indexes of its folders."""
    repeats = np.ones(len(dataset))
    for number, path in enumerate(dataset.paths):
        entries = (read_index(path.parent) or {}).get("shards", ())
        runs = next((entry.get(REPEATS) for entry in entries if entry["name"] == path.name), None)
        if not runs:
            continue
        places = np.flatnonzero(dataset.shard_numbers == number)
        if sum(count for _, count in runs) != len(places):
            raise UserError(
                f"{path.parent / INDEX}: has {REPEATS} for {sum(count for _, count in runs)} samples of {path.name}, "
                f"which holds {len(places)}; {MAKE_AGAIN}"
            )
        repeats[places] = np.repeat(*np.array(runs).T)
    return repeats
