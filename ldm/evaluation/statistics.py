"""Means over images with confidence intervals, by a paired bootstrap.

The interval is the percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).
Images are resampled with replacement, the same ones for the base and the tuned model. The interval contains the middle
95 % of the resampled statistics. It expresses the uncertainty from the choice of images. Noise and timesteps are fixed.
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
    """Statistic with its confidence interval; `low` and `high` are None for a single image."""

    value: float
    low: float | None
    high: float | None


class Summary(NamedTuple):
    """Statistics of one set. Losses are means over images, `loss_ratio` is the ratio of these means.

    `drift` is the mean of `Comparison.drift`.
    """

    loss_base: Interval
    loss_tuned: Interval
    loss_difference: Interval
    loss_ratio: Interval
    drift: Interval


class Bootstrap:
    """Resamples of `count` images, the same for every statistic and in every evaluation."""

    def __init__(self, count: int) -> None:
        self.count = count
        counts = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        self._weights = counts / count  # (resamples, images)

    def interval(self, statistic: Callable[..., Any], *values: np.ndarray) -> Interval:
        """Return `statistic` of the means of `values`, each (images,), with its interval."""
        value = float(statistic(*(array.mean() for array in values)))
        if self.count < 2:
            return Interval(value, None, None)
        resampled = statistic(*(self._weights @ array for array in values))
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(resampled, [tail, 100 - tail])
        return Interval(value, float(low), float(high))

    def mean(self, values: np.ndarray) -> Interval:
        """Return the mean of `values` (images,) with its interval."""
        return self.interval(lambda mean: mean, values)


def summarise(comparison: Comparison) -> tuple[Summary, list[Summary]]:
    """Return the statistics over all timesteps, each of equal weight, and the statistics per timestep."""
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
