"""Weights of samples: the number of times that an epoch has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from ldm.remote.path import ShardPath, as_path
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
    repeats = _repeats(dataset) if folder_repeats else {}
    if not repeats and all(weight == 1 for weight in by_shard.values()):
        return None
    weight_of = {as_path(name): weight for name, weight in by_shard.items()}
    parts = []
    for path, count in dataset.shard_sizes:
        runs = repeats.get(path) or [[1, count]]
        if sum(samples for _, samples in runs) != count:
            raise UserError(
                f"{path.parent / INDEX}: has {REPEATS} for {sum(samples for _, samples in runs)} samples of "
                f"{path.name}, which holds {count}; {MAKE_AGAIN}"
            )
        parts.append(weight_of.get(path, 1.0) * np.repeat(*np.array(runs).T))
    weights = np.concatenate(parts)
    if (weights == 1).all():
        return None
    found, counts = np.unique(weights, return_counts=True)
    shown = ", ".join(f"{count} of weight {weight:g}" for weight, count in zip(found, counts, strict=True))
    logger.info("training data: samples %s; about %d per epoch", shown, round(weights.sum()))
    return weights


def _repeats(dataset: ShardDataset) -> dict[ShardPath, list[list[int]]]:
    """Return the repeats of the samples of each shard for which an index has them."""
    folders = dict.fromkeys(path.parent for path in dataset.paths)
    return {
        folder / shard["name"]: shard[REPEATS]
        for folder in folders
        for shard in (read_index(folder) or {}).get("shards", ())
        if REPEATS in shard
    }
