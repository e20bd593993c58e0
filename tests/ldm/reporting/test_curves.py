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
    assert bands.title.startswith("Loss by band of timesteps")
    assert re.findall(r">(t\d+_\d+)<", bands.svg) == ["t0_499", "t500_999"]
    assert lines_of(losses.svg) == {(0, False)}
    assert lines_of(bands.svg) == {(0, False), (0, True), (1, False), (1, True)}


def lines_of(svg: str) -> set[tuple[int, bool]]:
    """Colour of each line in the figure, and whether it is dashed."""
    styles = re.findall(r'style="(fill: none; [^"]*stroke: var\(--c\d\)[^"]*)"', svg)
    return {(int(re.search(r"--c(\d)", style)[1]), "stroke-dasharray" in style) for style in styles}
