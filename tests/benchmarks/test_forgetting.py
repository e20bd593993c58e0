"""Tests of the image sets and the tables of the forgetting benchmark."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

SETS = ("cats", "new_cats", "near", "near_prior", "animals", "rest")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a file of `benchmarks/`, as its scripts import one another."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_what_is_measured_is_not_trained_on(module: Any) -> None:
    described = module("forgetting_sets")._image_sets()
    sets = {name: {entry["file_name"] for entry in entries} for name, (_, entries) in described.items()}
    assert (len(sets["cats"]), len(sets["new_cats"])) == (7, 3)
    assert all(len(sets[name]) >= 10 for name in ("near", "near_prior", "animals", "rest", "real"))
    for trained in ("cats", "real"):
        for measured in ("new_cats", "near", "animals", "rest"):
            assert not sets[trained] & sets[measured], (trained, measured)
    assert sets["near_prior"] < sets["real"] and not sets["near"] & sets["animals"]


def result(variant: str, seed: int, step: int, value: float, reached: bool = True) -> dict[str, Any]:
    """Return a result whose numbers all are `value`, except the final drift of the neighbours: 10 × `value`."""
    overall = {key: {"value": value} for key in ("loss_ratio", "drift")}
    samples = {key: {"value": value} for key in ("base_to_tuned", "base_to_image", "tuned_to_image")}
    points = {name: {"loss_ratio": value, "drift": value} for name in ("cats", "new_cats", "rest")}
    return {
        "variant": variant,
        "seed": seed,
        "step": step,
        "reached": reached,
        "sets": {name: {"overall": overall, "samples": samples} for name in SETS},
        "curve": [{"near": {"loss_ratio": 9, "drift": 9}}, {**points, "near": {"loss_ratio": 1, "drift": 10 * value}}],
    }


def test_the_tables_by_hand(module: Any) -> None:
    """Plain drifts by 0.2 and 0.4, the other by 0.1 each. The ratios are 0.5 and 0.25: 0.375 ± 0.18."""
    runs = [
        result("plain", 0, 100, 0.2),
        result("other", 0, 150, 0.1),
        result("plain", 1, 100, 0.4),
        result("other", 1, 300, 0.1, reached=False),
    ]
    text = module("forgetting_report").report(runs, 100, 300)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, _, plain, other, _, _, _, other_at_the_end = ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
    rows = [dict(zip(head, cells, strict=True)) for cells in (plain, other)]
    assert [row["learnt as well"] for row in rows] == ["2 of 2", "1 of 2"]
    assert [row["step"] for row in rows] == ["100 ± 0", "225 ± 100"]
    assert [row["neighbours: drift"] for row in rows] == ["0.3 ± 0.1", "0.1 ± 0"]
    assert [row["× plain's"] for row in rows] == ["1 ± 0", "0.375 ± 0.2"]
    assert other_at_the_end[0] == "other" and other_at_the_end[6] == "1 ± 0"
    assert "seeds 0, 1" in text and "(of the base's samples: 0.200)" in text
