"""Table, JSON and figure of evaluations at several strengths, with their Pareto front.

The front holds the strengths for which no other strength has both a lower loss of the subjects and a lower drift of
the other sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ldm.evaluation.report import FORMAT_VERSION, Row, aligned, summary_as_dict, write_content
from ldm.files import atomic_write


class AtStrength(NamedTuple):
    """Results of all sets at one strength."""

    strength: float
    rows: list[Row]

    def point(self, subjects: Sequence[str]) -> tuple[float, float]:
        """Return the mean loss of the sets `subjects`, relative to the base's, and the mean drift of the other sets."""
        losses = [row.overall.loss_ratio.value for row in self.rows if row.name in subjects]
        drifts = [row.overall.drift.value for row in self.rows if row.name not in subjects]
        return sum(losses) / len(losses), sum(drifts) / len(drifts)


def front_of(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return, per point, True if no other point is at most as high in both values and lower in one."""
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _on_front(swept: Sequence[AtStrength], subjects: Sequence[str]) -> list[bool]:
    return front_of([at.point(subjects) for at in swept])


def format_strengths(swept: Sequence[AtStrength], subjects: Sequence[str]) -> str:
    """Return an aligned text table with one line per strength. A star marks the Pareto front."""
    names = [row.name for row in swept[0].rows]
    head = ["strength", *(f"{name}: loss / base" for name in names), *(f"{name}: drift" for name in names), "front"]
    lines = [
        [
            f"{at.strength:g}",
            *(f"{row.overall.loss_ratio.value:.4g}" for row in at.rows),
            *(f"{row.overall.drift.value:.4g}" for row in at.rows),
            "*" if best else "",
        ]
        for at, best in zip(swept, _on_front(swept, subjects), strict=True)
    ]
    return aligned([head, *lines])


def write_strengths(swept: Sequence[AtStrength], subjects: Sequence[str], about: Mapping[str, Any], path: Path) -> None:
    """Write the results to `path` as JSON: `about` (files and settings), and the statistics per strength and set."""
    content = {
        "format_version": FORMAT_VERSION,
        **about,
        "subjects": list(subjects),
        "strengths": [
            {
                "strength": at.strength,
                "front": best,
                "sets": {row.name: summary_as_dict(row.overall) for row in at.rows},
            }
            for at, best in zip(swept, _on_front(swept, subjects), strict=True)
        ],
    }
    write_content(content, path)


def draw_strengths(swept: Sequence[AtStrength], subjects: Sequence[str], title: str, path: Path) -> None:
    """Write the figure to `path` as a PNG: loss per set over the strength, and the subject's loss over the drift."""
    with rc_context({"text.parse_math": False}):  # a `$` in a name is a plain character
        figure = Figure(figsize=(11, 4.6), dpi=100, layout="constrained")
        figure.suptitle(title)
        losses, plane = figure.subplots(1, 2)
        _draw_losses(losses, swept)
        _draw_plane(plane, swept, subjects)
        for axes in (losses, plane):
            axes.grid(color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_losses(axes: Axes, swept: Sequence[AtStrength]) -> None:
    axes.set(title="loss, relative to the base's", xlabel="strength", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own is a formula, which this text does not take
    axes.yaxis.set_minor_formatter(NullFormatter())
    for index, row in enumerate(swept[0].rows):
        values = [at.rows[index].overall.loss_ratio.value for at in swept]
        axes.plot([at.strength for at in swept], values, "o-", label=row.name)
    axes.legend(frameon=False)


def _draw_plane(axes: Axes, swept: Sequence[AtStrength], subjects: Sequence[str]) -> None:
    axes.set(
        title="Pareto front (filled)",
        xlabel=f"mean loss of {', '.join(subjects)}, relative to the base's",
        ylabel="mean drift of the other sets",
    )
    points = [at.point(subjects) for at in swept]
    front = [point for point, best in zip(points, front_of(points), strict=True) if best]
    axes.plot(*zip(*sorted(front), strict=True), "-", color="#0072b2")
    for at, point in zip(swept, points, strict=True):
        axes.plot(*point, "o", color="#0072b2", fillstyle="full" if point in front else "none")
        axes.annotate(f"{at.strength:g}", point, xytext=(5, 5), textcoords="offset points")
