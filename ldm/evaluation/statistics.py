"""Means over pictures with confidence intervals, by a paired bootstrap.

The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3): pictures are drawn
with replacement, the same ones for base and tuned, and the interval is the middle 95 % of the resampled statistics. It
covers the choice of pictures, not that of noise and timesteps, which are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ldm.evaluation.denoising import Comparison

RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A statistic and its interval, which a single picture does not give."""

    value: float
    low: float | None
    high: float | None


class Summary(NamedTuple):
    """Losses are means over pictures; `loss_ratio` is that of the two means, `drift` the mean of `Comparison.drift`."""

    loss_base: Interval
    loss_tuned: Interval
    loss_difference: Interval
    loss_ratio: Interval
    drift: Interval


class Bootstrap:
    """The resamples of `count` pictures: the same ones for every statistic, and in every evaluation."""

    def __init__(self, count: int) -> None:
        self.count = count
        draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        self._weights = draws / count  # (resamples, pictures)

    def interval(self, statistic: Callable[..., Any], *values: np.ndarray) -> Interval:
        """`statistic` of the means over pictures of `values`, each (pictures,)."""
        found = float(statistic(*(value.mean() for value in values)))
        if self.count < 2:
            return Interval(found, None, None)
        resampled = statistic(*(self._weights @ value for value in values))
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(resampled, [tail, 100 - tail])
        return Interval(found, float(low), float(high))

    def mean(self, values: np.ndarray) -> Interval:
        """The mean of `values` (pictures,)."""
        return self.interval(lambda mean: mean, values)


def summarise(comparison: Comparison) -> tuple[Summary, list[Summary]]:
    """Over all timesteps, each of equal weight, and for each timestep."""
    bootstrap = Bootstrap(len(comparison.base))
    overall = _summary(bootstrap, *(values.mean(1) for values in comparison))
    steps = comparison.base.shape[1]
    return overall, [_summary(bootstrap, *(values[:, step] for values in comparison)) for step in range(steps)]


def _summary(bootstrap: Bootstrap, base: np.ndarray, tuned: np.ndarray, drift: np.ndarray) -> Summary:
    return Summary(
        loss_base=bootstrap.mean(base),
        loss_tuned=bootstrap.mean(tuned),
        loss_difference=bootstrap.mean(tuned - base),
        loss_ratio=bootstrap.interval(lambda first, second: second / first, base, tuned),
        drift=bootstrap.mean(drift),
    )
