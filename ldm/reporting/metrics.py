"""Logged metrics of a run, from the CSV files of all its starts. Imports no torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ldm.files import read_at_most
from ldm.util import UserError

_MOST_BYTES = 1 << 29  # size limit of a CSV file
_VERSION = re.compile(r"version_(\d+)")
_TRAINING = "train/"
_MOST_STEP, _MOST_VALUE = 1 << 53, 1e100  # figures cannot show larger numbers


class Series(NamedTuple):
    """Finite values of a metric, below `_MOST_VALUE`, by optimizer step, in increasing order."""

    steps: list[int]
    values: list[float]

    @property
    def last(self) -> tuple[int, float]:
        return self.steps[-1], self.values[-1]

    @property
    def least(self) -> tuple[int, float]:
        value = min(self.values)
        return self.steps[self.values.index(value)], value


@dataclass
class Metrics:
    """Metrics by name, and the steps at which a value was not finite."""

    series: dict[str, Series] = field(default_factory=dict)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    steps: int = 0  # finished ones, as far as they are logged


def read_metrics(folder: Path, problems: list[str]) -> Metrics:
    """Return the metrics of the run in `folder`, and add a line to `problems` for each damaged file.

    A later start of the run replaces the values of earlier ones from its first value on. A start without values, such
    as one that has just begun, replaces none.
    """
    values: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("csv/*/metrics.csv"), key=_order):
        rows = _read_rows(path, path.relative_to(folder), problems)
        first = min((_finished(name, step) for step, row in rows for name in row), default=None)
        for name, found in values.items() if first is not None else ():
            values[name] = {step: value for step, value in found.items() if _finished(name, step) < first}
        for step, row in rows:
            for name, value in row.items():
                values.setdefault(name, {})[step] = value
    ends = (_finished(name, max(found)) for name, found in values.items() if found)
    metrics = Metrics(steps=max(ends, default=0))
    for name in sorted(values):
        found = sorted(values[name].items())
        finite = [(step, value) for step, value in found if _is_finite(value)]
        if finite:
            metrics.series[name] = Series(*map(list, zip(*finite, strict=True)))
        if len(finite) < len(found):
            metrics.not_finite[name] = [step for step, value in found if not _is_finite(value)]
    return metrics


def _finished(name: str, step: int) -> int:
    """Return the finished steps at a value. Losses of training have the number of their step, from 0 on."""
    return step + name.startswith(_TRAINING)


def _order(path: Path) -> tuple[int, str]:
    found = _VERSION.fullmatch(path.parent.name)
    return (int(found[1]) if found else 0, path.parent.name)


def _read_rows(path: Path, name: Path, problems: list[str]) -> list[tuple[int, dict[str, float]]]:
    """Return the step and the values of each row. Damaged lines, such as one cut by a kill, are counted."""
    try:
        text = read_at_most(path, _MOST_BYTES).decode("utf-8", errors="replace")
    except (OSError, UserError) as error:
        problems.append(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return []
    rows, damaged = [], 0
    lines = csv.DictReader(io.StringIO(text.replace("\0", "\ufffd"), newline=""))
    while True:
        try:
            row = next(lines, None)
            if row is None:
                break
            rows.append(_numbers(row))
        except (csv.Error, ValueError, TypeError, OverflowError):
            damaged += 1
    if damaged:
        problems.append(f"{name}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return rows


def _numbers(row: Mapping[str | None, str | None]) -> tuple[int, dict[str, float]]:
    if None in row or None in row.values() or "step" not in row:  # more or fewer cells than columns
        raise ValueError("a row of another length")
    values = {str(name): float(cell) for name, cell in row.items() if cell and name not in ("step", "epoch")}
    step = int(row["step"] or "")
    if abs(step) > _MOST_STEP:
        raise ValueError("not a number of steps")
    return step, values


def _is_finite(value: float) -> bool:
    return abs(value) < _MOST_VALUE  # False for NaN
