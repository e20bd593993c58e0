"""Results of an evaluation as a text table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.evaluation.releases import SetResult
from ldm.evaluation.statistics import CONFIDENCE, RESAMPLES, SEED, Interval, Summary, summarise
from ldm.files import atomic_write
from ldm.printable import escaped

FORMAT_VERSION = 2


class Row(NamedTuple):
    """Statistics of one set: over all timesteps, per timestep, and mean distances of the samples by name."""

    result: SetResult
    overall: Summary
    at_timesteps: list[Summary]
    samples: dict[str, Interval]

    @property
    def name(self) -> str:
        return self.result.image_set.name


def summarise_results(results: Sequence[SetResult]) -> list[Row]:
    """Compute the statistics of each set."""
    return [Row(r, *summarise(r.comparison), r.distances.means() if r.distances else {}) for r in results]


def format_table(rows: Sequence[Row]) -> str:
    """Return an aligned text table with one line per set; brackets are confidence intervals."""
    head = ["set", "images", "loss base", "loss tuned", "tuned / base", "drift"]
    lines = [
        [
            escaped(row.name),
            str(len(row.result.image_set)),
            f"{row.overall.loss_base.value:.5f}",
            f"{row.overall.loss_tuned.value:.5f}",
            format_interval(row.overall.loss_ratio),
            format_interval(row.overall.drift),
        ]
        for row in rows
    ]
    if any(row.samples for row in rows):
        head += ["base to tuned", "base to image", "tuned to image"]
        for line, row in zip(lines, rows, strict=True):
            line += [f"{interval.value:.4f}" for interval in row.samples.values()]
    return aligned([head, *lines])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return `lines` of cells as text in columns: the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def format_interval(interval: Interval) -> str:
    """Return the value and its confidence interval in brackets, if it has one."""
    if interval.low is None or interval.high is None:
        return f"{interval.value:.4g}"
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def write_json(rows: Sequence[Row], about: Mapping[str, Any], path: Path) -> None:
    """Write the results to `path`: `about` (files and settings), the statistical method, and all statistics per set."""
    content = {
        "format_version": FORMAT_VERSION,
        **about,
        "intervals": {
            "method": "percentile bootstrap over images, paired",
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": SEED,
        },
        "sets": {row.name: _set(row) for row in rows},
    }
    write_content(content, path)


def write_content(content: Mapping[str, Any], path: Path) -> None:
    """Write `content` to `path` as JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _set(row: Row) -> dict[str, Any]:
    image_set = row.result.image_set
    return {
        "shards": [str(path) for path in image_set.dataset.paths],
        "images": len(image_set),
        "keys": image_set.keys,
        "overall": summary_as_dict(row.overall),
        "timesteps": [
            {"t": t, **summary_as_dict(at)} for t, at in zip(row.result.timesteps, row.at_timesteps, strict=True)
        ],
        "samples": _samples(row),
    }


def summary_as_dict(summary: Summary) -> dict[str, dict[str, float | None]]:
    """Return the statistics by name, each as value, low and high."""
    return {name: interval._asdict() for name, interval in summary._asdict().items()}


def _samples(row: Row) -> dict[str, Any] | None:
    samples, distances = row.result.tuned, row.result.distances
    if samples is None or distances is None:
        return None
    images = [
        {"key": key, **request.described(), **dict(zip(distances._fields, values, strict=True))}
        for key, request, *values in zip(samples.keys, samples.requests, *distances, strict=True)
    ]
    return {**{name: interval._asdict() for name, interval in row.samples.items()}, "images": images}
