"""Learning-rate multipliers against the golden case."""

from __future__ import annotations

import pytest

from ldm import lr_scheduler
from ldm.util import UserError
from tests.golden_data import case

GOLDEN_CASE = case("lr_schedulers")


@pytest.mark.parametrize(
    "name", ["LambdaLinearScheduler", "LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2"]
)
def test_golden(name: str) -> None:
    scheduler = getattr(lr_scheduler, name)(**GOLDEN_CASE[name]["params"])
    values = [scheduler.schedule(n) for n in GOLDEN_CASE["n"]]
    assert values == pytest.approx(GOLDEN_CASE[name]["values"], rel=1e-9)
    assert scheduler(5) == scheduler.schedule(5)


def test_the_line_begins_with_the_cycle() -> None:
    scheduler = lr_scheduler.LambdaLinearScheduler([50], [0.0], [1.0], [0.0], [100])
    assert [scheduler(n) for n in (48, 49, 50, 75, 100)] == pytest.approx([0.96, 0.98, 0.5, 0.25, 0])


def test_last_value_holds() -> None:
    scheduler = lr_scheduler.LambdaWarmUpCosineScheduler2(**GOLDEN_CASE["LambdaWarmUpCosineScheduler2"]["params"])
    assert scheduler(100) == scheduler(10_000) == pytest.approx(0.05)


def test_lists_must_agree() -> None:
    with pytest.raises(UserError, match="one entry per cycle"):
        lr_scheduler.LambdaLinearScheduler([10], [0.1], [1.0], [0.0], [100, 100])
