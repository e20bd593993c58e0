"""Tests of means and their intervals, by hand and against an independent calculation."""

import numpy as np
import pytest

from ldm.evaluation.denoising import Comparison
from ldm.evaluation.statistics import Bootstrap, Interval, summarise


def test_two_images_by_hand():
    """The resampled mean of 0 and 1 is 0 or 1 with probability 1/4 each, so the middle 95 % reach from 0 to 1."""
    assert Bootstrap(2).mean(np.array([0.0, 1.0])) == Interval(0.5, 0.0, 1.0)


def test_a_single_image_has_no_interval():
    assert Bootstrap(1).mean(np.array([0.25])) == Interval(0.25, None, None)


def test_the_interval_of_many_images_is_that_of_a_normal_mean():
    values = np.random.default_rng(5).normal(3, 2, 400)
    found = Bootstrap(400).mean(values)
    error = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - error, found.value + error), abs=0.1 * error)


def test_base_and_tuned_are_resampled_together():
    """A difference that is equal for all images has an interval of length 0."""
    base = np.random.default_rng(1).uniform(0, 1, (20, 3))
    overall, at = summarise(Comparison(base, base + 0.5, np.full((20, 3), 0.25)))
    assert tuple(overall.loss_difference) == pytest.approx((0.5, 0.5, 0.5))
    assert tuple(overall.drift) == pytest.approx((0.25, 0.25, 0.25))
    assert overall.loss_base.high - overall.loss_base.low > 0.05
    assert len(at) == 3 and at[1].loss_base.value == pytest.approx(base[:, 1].mean())


def test_the_ratio_is_the_ratio_of_the_means():
    base, tuned = np.array([[1.0, 3.0], [3.0, 5.0]]), np.array([[2.0, 2.0], [4.0, 8.0]])
    overall, at = summarise(Comparison(base, tuned, np.array([[0.1, 0.3], [0.5, 0.7]])))
    assert overall.loss_base.value == 3 and overall.loss_tuned.value == 4
    assert overall.loss_ratio.value == pytest.approx(4 / 3)
    assert (overall.loss_ratio.low, overall.loss_ratio.high) == pytest.approx((1.0, 1.5))  # the first alone, the second
    assert overall.drift.value == pytest.approx(0.4)
    assert [step.loss_ratio.value for step in at] == pytest.approx([1.5, 1.25])


def test_a_model_compared_with_itself_has_ratio_one():
    base = np.random.default_rng(2).uniform(0, 1, (7, 4))
    overall, at = summarise(Comparison(base, base, np.zeros((7, 4))))
    assert all(summary.loss_ratio == (1, 1, 1) and summary.drift == (0, 0, 0) for summary in (overall, *at))


def test_intervals_are_the_same_each_time():
    values = np.random.default_rng(3).uniform(0, 1, 9)
    assert Bootstrap(9).mean(values) == Bootstrap(9).mean(values)
