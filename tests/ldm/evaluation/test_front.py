"""Tests of the Pareto front of a sweep of strengths."""

from __future__ import annotations

from ldm.evaluation.front import front_of


def test_front_of_keeps_what_no_other_point_beats() -> None:
    points = [(1.0, 0.0), (0.5, 0.1), (0.6, 0.1), (0.5, 0.2), (0.2, 0.4), (0.2, 0.4)]
    assert front_of(points) == [True, True, False, False, True, True]
