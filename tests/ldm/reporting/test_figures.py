from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from ldm.reporting.figures import Curve, _decorate, draw_lines, running_mean, thinned


def test_draw_lines_writes_svg_with_own_ids_and_colours_of_the_page() -> None:
    curves = [Curve("$loss <1>", [0, 1, 2], [3.0, 2.0, 1.0])]
    one, other = (draw_lines(name, curves, "loss", levels=[("limit", 2.5)]) for name in ("one", "other"))
    root = ElementTree.fromstring(one)
    assert root.attrib["viewBox"] and "width" not in root.attrib
    assert "$loss &lt;1&gt;" in one and "limit" in one
    assert "var(--c0)" in one and "var(--ink)" in one and "#0103" not in one and "#0102" not in one
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    referenced = set(re.findall(r'(?:url\(#|href="#)([^")]+)', one))
    assert referenced and referenced <= ids[0]


def test_draw_lines_of_a_long_noisy_curve_is_small() -> None:
    values = np.random.default_rng(0).standard_normal(100_000)
    assert len(draw_lines("long", [Curve("loss", range(100_000), values, noisy=True)], "loss")) < 100_000


def test_thinned_keeps_the_mean() -> None:
    steps, values = thinned(range(1800), np.arange(1800.0))
    assert len(steps) == 600 and values.mean() == steps.mean() == 899.5


def test_running_mean_begins_with_the_first_value() -> None:
    np.testing.assert_allclose(running_mean(np.array([1.0, 3.0, 5.0]), 2), [1, 2, 4])


@pytest.mark.parametrize(("values", "top"), [([0.58, 0.59], 0.59), ([0.0, 0.0], 0.0)])
def test_an_axis_from_zero_has_room_above_the_curve(values: list[float], top: float) -> None:
    axes = Figure().subplots()
    axes.plot([0, 1], values)
    _decorate(axes, "step", "GiB", zero=True)
    low, high = axes.get_ylim()
    assert low == 0 and high > top
