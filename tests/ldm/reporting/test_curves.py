"""Figures of a run's metrics."""

from __future__ import annotations

import re

from ldm.reporting.curves import draw_run, held_out_losses
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


def test_draw_run_shows_held_out_bands_in_the_colours_of_training() -> None:
    names = ("train/loss_simple", "train/loss_t500_999", "train/loss_t0_499", "val/loss_t0_499", "val/loss_t500_999")
    metrics = Metrics({name: Series([0, 1], [0.1, 0.2]) for name in names})
    assert held_out_losses(metrics) == []
    losses, bands = draw_run(metrics, {}, "run")
    assert "held out" not in losses.svg and bands.title.startswith("Loss by band of timesteps")
    labels = re.findall(r">(t\d+_\d+[^<]*)<", bands.svg)
    assert labels == ["t0_499", "t0_499, held out", "t500_999", "t500_999, held out"]
    lines = re.findall(
        r'd="M [^"]*L[^"]*"[^>]*style="fill: none; (stroke-dasharray[^;]*; )?[^"]*stroke: var\(--c(\d)\)', bands.svg
    )
    assert {(colour, bool(dashes)) for dashes, colour in lines} == {
        ("0", False),
        ("0", True),
        ("1", False),
        ("1", True),
    }
