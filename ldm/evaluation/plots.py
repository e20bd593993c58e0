"""Figure of an evaluation: loss and drift per set, drift per timestep, and samples of the base and tuned models."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from ldm.evaluation.report import Row
from ldm.evaluation.statistics import Interval
from ldm.files import atomic_write
from ldm.images.grid import to_images

# Colours that colour-blind readers can distinguish (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK, _PALE = "#333333", "#dddddd"
_WIDTH, _CHARTS = 13.2, 3.6  # inches: the width of the figure, and the height of its charts
_PAIR, _TITLE = 1.7, 0.4  # inches: the height of a row of samples with captions, and of a set's title
_COLUMNS = 6  # pairs of samples per row
_LETTERS = 30  # characters per line of a caption


def write_figure(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the figure of `rows` to `path` as a PNG with 100 pixels per inch."""
    sampled = [(index, row) for index, row in enumerate(rows) if row.samples]
    heights = [_CHARTS, *(_TITLE + _PAIR * -(-len(row.result.tuned.requests) // _COLUMNS) for _, row in sampled)]
    with rc_context({"text.parse_math": False}):  # a `$` in a name or a prompt is a plain character
        figure = _figure(rows, title, sampled, heights)
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png")


def _figure(rows: Sequence[Row], title: str, sampled: Sequence[tuple[int, Row]], heights: Sequence[float]) -> Figure:
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_charts(parts[0], rows, title)
    for part, (index, row) in zip(parts[1:], sampled, strict=True):
        _draw_samples(part, row, _colour(index))
    return figure


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _draw_charts(figure: SubFigure, rows: Sequence[Row], title: str) -> None:
    figure.suptitle(title, color=_INK)
    loss, drift, timesteps = figure.subplots(1, 3)
    _draw_bars(loss, "loss, tuned / base", rows, lambda row: row.overall.loss_ratio, start=1.0)
    _draw_bars(drift, "drift of the noise prediction", rows, lambda row: row.overall.drift, start=0.0)
    timesteps.set_title("drift per timestep", color=_INK)
    for index, row in enumerate(rows):
        values = [at.drift.value for at in row.at_timesteps]
        timesteps.plot(row.result.timesteps, values, "o-", color=_colour(index))
    timesteps.set_ylim(bottom=0)
    for axes in (loss, drift, timesteps):
        axes.grid(axis="y", color=_PALE)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [loss.patches[index] for index in range(len(rows))]
    labels = [f"{row.name}: {len(row.result.image_set)} images" for row in rows]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(rows), 4), frameon=False)


def _draw_bars(axes: Axes, title: str, rows: Sequence[Row], select: Callable[[Row], Interval], *, start: float) -> None:
    """Draw one bar per set, from `start` to its value, with its confidence interval."""
    axes.set_title(title, color=_INK)
    axes.axhline(start, color=_INK, linewidth=1)
    for index, row in enumerate(rows):
        value, low, high = select(row)
        axes.bar(index, value - start, 0.5, bottom=start, color=_colour(index))
        if low is not None and high is not None:
            # Rounding can put a value outside its interval; the whisker on that side then has length 0.
            whiskers = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
            axes.errorbar(index, value, yerr=whiskers, color=_INK, capsize=5)
    names = [f"{textwrap.shorten(row.name, 14, placeholder='…')}\n{select(row).value:.3g}" for row in rows]
    axes.set_xticks(range(len(rows)), names)


def _draw_samples(figure: SubFigure, row: Row, colour: str) -> None:
    """Draw the pairs of base and tuned samples of one set with their captions."""
    assert row.result.base and row.result.tuned
    distance = row.samples["base_to_tuned"].value
    figure.suptitle(
        f"{row.name}: base (left) and tuned (right), same seeds; distance {distance:.3f}",
        color=colour,
        x=0.01,
        ha="left",
    )
    base, tuned = (to_images(samples.images) for samples in (row.result.base, row.result.tuned))
    grid = figure.subplots(-(-len(base) // _COLUMNS), _COLUMNS, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, *pair, request in zip(grid, base, tuned, row.result.tuned.requests, strict=False):
        for place, image in enumerate(pair):
            left = place * 1.02
            axes.imshow(image, extent=(left, left + 1, 0, image.height / image.width), interpolation="bicubic")
        axes.set_xlim(0, 2.02)
        caption = textwrap.wrap(request.prompt, _LETTERS, max_lines=2, placeholder=" …")
        axes.set_title("\n".join(caption), fontsize=8, color=_INK, y=-0.03, pad=0, va="top")
