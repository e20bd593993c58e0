"""Tests of the image sets and the tables of the forgetting benchmark."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a file of `benchmarks/`, as its scripts import one another."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(("name", "trained", "new"), [("cats", 7, 3), ("clocks", 8, 4)])
def test_what_is_measured_is_not_trained_on(module: Any, name: str, trained: int, new: int) -> None:
    sets = module("forgetting_sets")
    described = sets._image_sets(sets.FAMILIES[name])
    sets = {name: {entry["file_name"] for entry in entries} for name, (_, entries) in described.items()}
    assert (len(sets["subject"]), len(sets["new"])) == (trained, new)
    assert all(len(sets[name]) >= 10 for name in ("near", "near_prior", "kin", "rest", "real"))
    for trained_on in ("subject", "real"):
        for measured in ("new", "near", "kin", "rest"):
            assert not sets[trained_on] & sets[measured], (trained_on, measured)
    assert sets["near_prior"] < sets["real"] and not sets["near"] & sets["kin"]


@pytest.mark.parametrize("name", ["cats", "clocks"])
def test_priors_have_no_caption_that_they_must_not(module: Any, name: str) -> None:
    sets = module("forgetting_sets")
    family = sets.FAMILIES[name]
    captions = {name: set(texts) for name, texts in sets._prior_captions(family).items()}
    images = sets._image_sets(family)
    measured = {name: {entry["text"] for entry in images[name][1]} for name in ("near", "kin", "rest", "subject")}
    assert not (captions["kin"] | captions["others"]) & set().union(*measured.values())
    assert measured["near"] < captions["known"] and not captions["known"] & (measured["rest"] | measured["subject"])


def point(step: int, strength: float, subject: float, value: float) -> dict[str, Any]:
    """Return a point with the loss `subject` of trained and new images, and `value` as loss and drift of the others."""
    learnt = {name: {"loss_ratio": subject, "drift": 9.0} for name in ("subject", "new")}
    others = {name: {"loss_ratio": value, "drift": value} for name in ("near", "rest")}
    return {"step": step, "strength": strength, **learnt, **others}


def result(variant: str, seed: int, curve: list[Any], swept: list[Any], learnt: float = 0.1) -> dict[str, Any]:
    """Return the result of a run."""
    asked = {name: {"loss_ratio": learnt} for name in ("subject", "new")}
    start = point(0, 1.0, 1.0, 1.0)
    own = {"curve": [start, *curve], "swept": swept, "learnt": asked}
    return {"variant": variant, "seed": seed, "commit": "abc", "prior_samples": 5, **own}


def runs() -> list[dict[str, Any]]:
    """Return runs where plain drifts by 0.2 and 0.4, and the other by 0.1 each."""
    lower, as_well = point(200, 0.7, 0.2, 0.05), point(200, 0.8, 0.1, 0.1)
    return [
        result("plain", 0, [point(100, 1.0, 0.1, 0.2)], [point(100, 0.9, 0.2, 0.1), point(100, 1.0, 0.1, 0.2)]),
        result("plain", 1, [point(100, 1.0, 0.1, 0.4)], [point(100, 1.0, 0.1, 0.4)]),
        result("other", 0, [point(150, 1.0, 0.3, 0.7)], [lower, as_well, point(200, 1.0, 0.05, 0.3)]),  # at 0.8
        result("other", 1, [point(150, 1.0, 0.1, 0.1), point(200, 1.0, 0.2, 9.0)], [lower]),  # at step 150
    ]


def test_the_tables_by_hand(module: Any) -> None:
    """The ratios of the other are 0.5 and 0.25: 0.375 ± 0.18."""
    text = module("forgetting_report").report("cats", runs(), 100, 200)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, _, plain, other, *_ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    rows = [dict(zip(head, cells, strict=True)) for cells in (plain, other)]
    assert [row["learnt as well"] for row in rows] == ["2 of 2", "2 of 2"]
    assert [row["steps"] for row in rows] == ["100 ± 0", "175 ± 40"]
    assert [row["strength"] for row in rows] == ["1 ± 0", "0.9 ± 0.1"]
    assert [row["neighbours drift"] for row in rows] == ["0.3 ± 0.1", "0.1 ± 0"]
    assert [row["neighbours drift ratio"] for row in rows] == ["1 ± 0", "0.375 ± 0.2"]
    assert "seeds 0, 1" in text


def test_the_summary_by_hand(module: Any) -> None:
    report = module("forgetting_report")
    content = report.summary({"cats": runs()})
    other = content["families"]["cats"]["other"]
    assert content["commit"] == "abc" and other["seeds"] == [0, 1] and other["prior_data"] == 5
    assert other["learnt"] is True and other["neighbours_drift_ratio"] == pytest.approx(0.375)
    assert other["neighbours_drift_ratio_deviation"] == pytest.approx(0.1768, abs=1e-4)
    never = result("never", 0, [point(200, 1.0, 0.3, 0.7)], [point(200, 1.0, 0.3, 0.6)])
    of_never = report.summary({"cats": [*runs(), never]})["families"]["cats"]["never"]
    assert of_never["learnt"] is False and of_never["neighbours_drift_ratio"] == pytest.approx(3.5)
    assert of_never["neighbours_drift_ratio_deviation"] is None
