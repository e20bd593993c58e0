"""Figures of a run's metrics."""

from __future__ import annotations

from ldm.reporting.curves import draw_run
from ldm.reporting.metrics import Metrics, Series


def test_draw_run_shows_the_gap_and_the_norms() -> None:
    names = ("train/loss_simple", "val/gap", "gradient_norm/out", "update_ratio/out", "update_ratio/middle_block")
    drawn = draw_run(Metrics({name: Series([0, 1], [-0.1, 0.2]) for name in names}), {}, "run")
    assert [figure.title.split(",")[0] for figure in drawn] == [
        "Loss of training and of held-out images",
        "Held-out loss minus training loss",
        "Norm of the gradient by part of the model",
        "Norm of a step",
    ]
    assert "middle_block" in drawn[-1].svg and "out" in drawn[-1].svg
