"""Tables and summary of `forgetting.py`, made from the result dicts of its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

Result = Mapping[str, Any]
Point = Mapping[str, Any]  # step, strength, and loss ratio and drift per set
Chosen = Callable[[Result], tuple[Point, bool]]
Value = Callable[[Result, Point], float]


def equal_on(subject: str) -> Chosen:
    """Return a function that finds the point of a result where the loss of the set `subject` is that of plain training.

    It is the lowest strength that has learnt as well, else the first step. If there is none, it is the last step.
    """

    def choose(result: Result) -> tuple[Point, bool]:
        asked = result["learnt"][subject]["loss_ratio"] * (1 + 1e-9)  # digits differ between the two evaluations
        after = [point for point in result["curve"] if point["step"]]
        points = [*sorted(result["swept"], key=lambda point: point["strength"]), *after]
        learnt = [point for point in points if point[subject]["loss_ratio"] <= asked]
        return (learnt[0], True) if learnt else (after[-1], False)

    return choose


def report(family: str, results: Sequence[Result], reference: int, steps: int) -> str:
    """Return both tables of a family, with an explanation. The first of `results` must be a plain run."""
    seeds = sorted({result["seed"] for result in results})
    tables = [_markdown(_rows(_by_variant(results), equal_on(subject))) for subject in ("subject", "new")]
    return f"""\
### {family}

Means over the seeds {", ".join(map(str, seeds))}, ± standard deviations where a method has several. Losses are
multiples of the base's. The drift is the one of tools/evaluate.py.

At the loss on the trained images of plain fine-tuning after {reference} steps. The strength is the lowest with this
loss after {steps} steps; if there is none, the step is the first with it at strength 1:

{tables[0]}

At its loss on the new images:

{tables[1]}
"""


def summary(families: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """Return the content of forgetting.json: per family and method, means and deviations at equal learning."""
    methods = {
        family: {name: _summary_of(runs, results) for name, runs in _by_variant(results).items()}
        for family, results in families.items()
    }
    first = next(result for results in families.values() for result in results)
    return {"commit": first["commit"], "families": methods}


def _summary_of(runs: Sequence[Result], results: Sequence[Result]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "seeds": [run["seed"] for run in runs],
        "prior_data": runs[0]["prior_samples"],
        "commits": sorted({run["commit"] for run in runs}),
    }
    for name, subject in (("", "subject"), ("new_", "new")):
        chosen = equal_on(subject)
        points = [chosen(run) for run in runs]
        content[f"{name}learnt"] = all(reached for _, reached in points)
        for key, value in _values(results).items():
            found = [value(run, point) for run, (point, _) in zip(runs, points, strict=True)]
            content[f"{name}{key}"] = mean(found)
            content[f"{name}{key}_deviation"] = stdev(found) if len(found) > 1 else None
    return content


def _values(results: Sequence[Result]) -> dict[str, Value]:
    """Return the numbers of a result at a point, by name. Drift ratios are to the plain result of the same seed."""
    plain = {run["seed"]: _reference(run) for run in next(iter(_by_variant(results).values()))}

    def ratio(name: str) -> Value:
        return lambda run, point: point[name]["drift"] / plain[run["seed"]][name]["drift"]

    return {
        "steps": lambda _, point: point["step"],
        "strength": lambda _, point: point["strength"],
        "trained_loss": lambda _, point: point["subject"]["loss_ratio"],
        "new_loss": lambda _, point: point["new"]["loss_ratio"],
        "neighbours_drift": lambda _, point: point["near"]["drift"],
        "neighbours_drift_ratio": ratio("near"),
        "neighbours_loss": lambda _, point: point["near"]["loss_ratio"],
        "rest_drift_ratio": ratio("rest"),
        "rest_loss": lambda _, point: point["rest"]["loss_ratio"],
    }


def _reference(plain: Result) -> Point:
    """Return plain fine-tuning at the step that sets the loss, at strength 1."""
    return next(point for point in plain["swept"] if point["strength"] == 1)


def _by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    variants: dict[str, list[Result]] = {}
    for result in results:
        variants.setdefault(result["variant"], []).append(result)
    return variants


def _rows(variants: Mapping[str, Sequence[Result]], chosen: Chosen) -> list[list[str]]:
    values = _values([run for runs in variants.values() for run in runs])
    rows = [["method", "seeds", "prior samples", "learnt as well", *(name.replace("_", " ") for name in values)]]
    for name, runs in variants.items():
        points = [chosen(run) for run in runs]
        reached = f"{sum(reached for _, reached in points)} of {len(points)}"
        spreads = (
            _spread(value(run, point) for run, (point, _) in zip(runs, points, strict=True))
            for value in values.values()
        )
        rows.append([name, str(len(runs)), str(runs[0]["prior_samples"]), reached, *spreads])
    return rows


def _spread(values: Iterable[float]) -> str:
    """Return `mean ± standard deviation` as text."""
    values = list(values)
    middle = _rounded(mean(values), 3)
    return f"{middle} ± {_rounded(stdev(values), 1)}" if len(values) > 1 else middle


def _rounded(value: float, digits: int) -> str:
    """Return `value` with `digits` significant digits; 86.6 with one digit is 90, not the 9e+01 of `.1g`."""
    return f"{float(f'{value:.{digits}g}'):g}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
