"""Line figures as SVG for a page. Colours are CSS variables of the page, which has a light and a dark scheme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that are replaced by CSS variables after drawing.
_INK, _LINE = "#010203", "#010204"
_COLOURS = tuple(f"#01030{number}" for number in range(8))
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(_COLOURS)
}
_SIZE = (5.0, 2.8)  # inches; the letters are as large as those of the page on a phone
_FONT = 10  # points
_LETTER, _HANDLE = 0.08, 0.5  # inches: width of a letter of a legend, and of a line with its margins
_MOST_LETTERS = 48  # of a label
_POINTS = 600  # of a curve; more are averaged
_WINDOW = 25  # points of the running mean of a noisy curve
_REFERENCE = re.compile(r'\bid="|url\(#|href="#')


class Curve(NamedTuple):
    """Values by step.

    The curve of a noisy metric is drawn pale under its running mean. `colour` is the number of its colour, if it is not
    that of its place among the curves.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    noisy: bool = False
    markers: bool = False
    dashed: bool = False
    colour: int | None = None


def draw_lines(
    name: str,
    curves: Sequence[Curve],
    ylabel: str,
    *,
    xlabel: str = "step",
    levels: Sequence[tuple[str, float]] = (),
    zero: bool = False,
) -> Markup:
    """Return an SVG with `curves` in common axes, and a dashed horizontal line for each of `levels`.

    Args:
        name: prefix of the ids in the SVG, unique in the page.
        zero: let the y axis begin at 0.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.family": "sans-serif"}
    with rc_context({**settings, "text.color": _INK, "axes.labelcolor": _INK, "font.size": _FONT}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            _draw(axes, curve, _COLOURS[(number if curve.colour is None else curve.colour) % len(_COLOURS)])
        for label, level in levels:
            axes.axhline(level, color=_INK, linestyle="--", linewidth=1, label=label)
        _decorate(axes, xlabel, ylabel, zero)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            return _as_markup(figure, name)


def _draw(axes: Axes, curve: Curve, colour: str) -> None:
    steps, values = thinned(curve.steps, curve.values)
    style = {"linestyle": "--" if curve.dashed else "-"}
    if curve.markers or len(steps) == 1:
        style |= {"marker": "o", "markersize": 3}
    if curve.noisy and len(steps) >= 2 * _WINDOW:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        values = running_mean(values, _WINDOW)
    axes.plot(steps, values, color=colour, linewidth=1.4, label=_shortened(curve.label), **style)


def _shortened(label: str) -> str:
    half = _MOST_LETTERS // 2
    return label if len(label) <= _MOST_LETTERS else f"{label[:half]}…{label[-half:]}"


def _decorate(axes: Axes, xlabel: str, ylabel: str, zero: bool) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.tick_params(colors=_INK)
    axes.grid(color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.patch.set_visible(False)
    if zero:
        axes.set_ylim(0, 1.05 * max(axes.dataLim.y1, 0) or None)  # with room above a curve that is nearly level
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = int(_SIZE[0] / (_HANDLE + _LETTER * max(map(len, labels)))) or 1
        style = {"frameon": False, "labelcolor": _INK, "fontsize": _FONT - 1, "handlelength": 1.5, "columnspacing": 1.0}
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns, **style)


def _as_markup(figure: Figure, name: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None,
                                                                    "Type": None})  # fmt: skip
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _REFERENCE.sub(lambda found: f"{found[0]}{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # The page sets the size; the viewBox keeps the proportions.
    return Markup(re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2))


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return means of consecutive points, at most `_POINTS` of them."""
    size = -(-len(steps) // _POINTS) or 1
    cuts = np.arange(0, len(steps), size)
    counts = np.diff([*cuts, len(steps)])
    return tuple(np.add.reduceat(np.asarray(part, np.float64), cuts) / counts for part in (steps, values))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value with the values before it, at most `window` of them."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
