"""Evaluations of `tools/evaluate.py` in a run folder or beside it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.files import read_at_most
from ldm.reporting.strips import Shown, show_file
from ldm.util import UserError

NAME = "evaluation.json"
_MOST_BYTES = 1 << 27  # size limit of the file
_MOST = 4  # evaluations in a report
_MOST_SETS, _MOST_NUMBER = 50, 1 << 53


class WatchedSet(NamedTuple):
    """Loss, its ratio and drift of a set, overall and by timestep."""

    name: str
    images: int
    loss_base: float
    loss_tuned: float
    ratio: str
    drift: str
    timesteps: list[int]
    drift_at: list[float]
    ratio_at: list[float]


class Evaluation(NamedTuple):
    """Content of an `evaluation.json`, with the figure beside it."""

    path: str
    base: str
    tuned: str
    sets: list[WatchedSet]
    figure: Shown | None


def read_evaluations(folder: Path, problems: list[str]) -> list[Evaluation]:
    """Return the evaluations in the run `folder`, else those in the folder beside it that are not of other runs."""
    inside = [folder / NAME, *sorted(folder.glob(f"*/{NAME}"))]
    others = [path for path in sorted(folder.parent.glob(f"*/{NAME}")) if not (path.parent / "configs").is_dir()]
    beside = [folder.parent / NAME, *others]
    places = next((found for paths in (inside, beside) if (found := [path for path in paths if path.is_file()])), [])
    evaluations = []
    for path in places[:_MOST]:
        try:
            evaluations.append(_read(path))
        except (OSError, UserError, ValueError, OverflowError, RecursionError) as error:
            problems.append(f"{path}: cannot be read ({str(error).splitlines()[0][:200]})")
        except (KeyError, TypeError, AttributeError):
            problems.append(f"{path}: not an evaluation of tools/evaluate.py")
    return evaluations


def _read(path: Path) -> Evaluation:
    content = json.loads(read_at_most(path, _MOST_BYTES))
    if len(content["sets"]) > _MOST_SETS:
        raise UserError(f"has {len(content['sets'])} sets; a report takes up to {_MOST_SETS}")
    sets = [_read_set(name, entry) for name, entry in content["sets"].items()]
    try:
        figure = show_file(path.with_suffix(".png"), "evaluation")
    except UserError:
        figure = None
    return Evaluation(str(path), str(content["base"]), str(content["tuned"]), sets, figure)


def _read_set(name: str, entry: Mapping[str, Any]) -> WatchedSet:
    overall, steps = entry["overall"], entry["timesteps"]
    return WatchedSet(
        name,
        _count(entry["images"]),
        float(overall["loss_base"]["value"]),
        float(overall["loss_tuned"]["value"]),
        _interval(overall["loss_ratio"]),
        _interval(overall["drift"]),
        [_count(step["t"]) for step in steps],
        [float(step["drift"]["value"]) for step in steps],
        [float(step["loss_ratio"]["value"]) for step in steps],
    )


def _count(value: Any) -> int:
    count = int(value)
    if not 0 <= count <= _MOST_NUMBER:
        raise ValueError(f"{count:.3g} is not a count")
    return count


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.4g}"
    return f"{found['value']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"
