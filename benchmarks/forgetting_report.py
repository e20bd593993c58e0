"""Tables of `forgetting.py`, made from the result dicts of its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

Result = Mapping[str, Any]
Value = Callable[[Result], float]


def report(results: Sequence[Result], reference: int, steps: int) -> str:
    """Return both tables with an explanation. The first of `results` must be a run of plain fine-tuning."""
    variants: dict[str, list[Result]] = {}
    for result in results:
        variants.setdefault(result["variant"], []).append(result)
    seeds = ", ".join(str(result["seed"]) for result in next(iter(variants.values())))
    base = results[0]["sets"]["new_cats"]["samples"]["base_to_image"]["value"]
    return f"""\
Mean ± standard deviation over the seeds {seeds}. Losses are multiples of the base's losses. The drift is the one of
tools/evaluate.py. The distance is measured between samples of the new cats' captions and their images
(of the base's samples: {base:.3f}).

At equal learning: each run at the step where its loss on the trained cats is as low as that of plain fine-tuning after
{reference} steps, or after {steps} steps if it never is:

{_markdown(_at_equal_learning(variants))}

After {steps} steps:

{_markdown(_at_the_end(variants))}
"""


def _at_equal_learning(variants: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    plain = {result["seed"]: result for result in next(iter(variants.values()))}

    def overall(name: str, value: str) -> Value:
        return lambda result: result["sets"][name]["overall"][value]["value"]

    def sampled(name: str, value: str) -> Value:
        return lambda result: result["sets"][name]["samples"][value]["value"]

    drift = overall("near", "drift")
    columns: dict[str, Value] = {
        "step": lambda result: result["step"],
        "trained cats: loss": overall("cats", "loss_ratio"),
        "new cats: loss": overall("new_cats", "loss_ratio"),
        "new cats: distance": sampled("new_cats", "tuned_to_image"),
        "neighbours: drift": drift,
        "× plain's": lambda result: drift(result) / drift(plain[result["seed"]]),
        "neighbours: loss": overall("near", "loss_ratio"),
        "neighbours: distance from the base": sampled("near", "base_to_tuned"),
        "neighbours in the prior: drift": overall("near_prior", "drift"),
        "other animals: drift": overall("animals", "drift"),
        "rest: drift": overall("rest", "drift"),
        "rest: loss": overall("rest", "loss_ratio"),
    }
    rows = [["", "learnt as well", *columns]]
    for name, results in variants.items():
        reached = f"{sum(result['reached'] for result in results)} of {len(results)}"
        rows.append([name, reached, *(_spread(map(value, results)) for value in columns.values())])
    return rows


def _at_the_end(variants: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    sets = {"trained cats": "cats", "new cats": "new_cats", "neighbours": "near", "rest": "rest"}
    keys = {"loss": "loss_ratio", "drift": "drift"}
    rows = [["", *(f"{title}: {measure}" for title in sets for measure in keys)]]
    for name, results in variants.items():
        last = [result["curve"][-1] for result in results]
        rows.append([name, *(_spread(point[s][key] for point in last) for s in sets.values() for key in keys.values())])
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
