"""Figures of a run's metrics: loss, loss by timestep band, watched sets, learning rate, speed and memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from ldm.reporting.evaluations import Evaluation
from ldm.reporting.figures import Curve, draw_lines
from ldm.reporting.metrics import Metrics, Series

_LOSSES = ("train/loss_simple", "train/loss", "train/total_loss", "train/aeloss", "train/rec_loss")
_BAND = re.compile(r"(train|val)/loss_(t(\d+)_\d+)")  # `ldm.callbacks.timestep_losses` logs these
_MOST_HELD_OUT = 4  # curves
# Starts of the names that `ldm.callbacks.block_norms` logs, titles, and labels of the axis.
_NORMS = (
    ("gradient_norm/", "Norm of the gradient by part of the model", "norm"),
    ("update_ratio/", "Norm of a step, relative to the weights, by part of the model", "ratio"),
)


class DrawnFigure(NamedTuple):
    """Figure with its title."""

    title: str
    svg: Markup


def training_loss(metrics: Metrics) -> str | None:
    """Return the name of the metric that is shown as the loss of training."""
    names = [*_LOSSES, *(name for name in metrics.series if name.startswith("train/") and "loss" in name)]
    return next((name for name in names if name in metrics.series), None)


def held_out_losses(metrics: Metrics) -> list[str]:
    """Return the names of the validation losses that compare with `training_loss`."""
    own = (training_loss(metrics) or "train/loss_simple").removeprefix("train/")
    names = [
        name for name in metrics.series if name.startswith("val/") and "loss" in name and not _BAND.fullmatch(name)
    ]
    alike = [name for name in names if name.removeprefix("val/").removesuffix("_ema") == own]
    return (alike or names)[:_MOST_HELD_OUT]


def draw_run(metrics: Metrics, forecast: Mapping[str, float], prefix: str) -> list[DrawnFigure]:
    """Return the figures of one run. `forecast` has the predicted memory in GiB."""
    series = metrics.series
    loss = training_loss(metrics)
    rates = [name for name in series if name.startswith("lr-")]
    losses = [*([Curve(loss, *series[loss], noisy=True)] if loss else []), *_curves(series, held_out_losses(metrics))]
    levels = [("predicted for the GPU", forecast["device"])] if "device" in forecast else []
    plans: list[tuple[str, list[Curve], str, dict]] = [
        ("Loss of training and of held-out images", losses, "loss", {}),
        ("Held-out loss minus training loss, at equal timesteps", _curves(series, ["val/gap"]), "loss", {}),
        ("Loss by band of timesteps, of training and (dashed) of held-out images", _bands(series), "loss", {}),
        *[(f"Watched sets: {what}", _curves(series, _watched(series, metric)), what, {"zero": metric == "drift"})
          for metric, what in (("loss", "loss"), ("loss_ratio", "loss / initial loss"), ("drift", "drift"))],
        ("Learning rate", [Curve(name, *series[name]) for name in rates], "learning rate", {}),
        *[(title, [Curve(name.removeprefix(start), *series[name], noisy=True) for name in series
                   if name.startswith(start)], label, {"zero": True}) for start, title, label in _NORMS],
        ("Seconds per step, mean of each epoch", _curves(series, ["device/step_seconds"], ""), "s", {"zero": True}),
        ("Peak memory of each epoch, and its forecast", _curves(series, ["device/peak_memory_gib"], ""), "GiB",
         {"zero": True, "levels": levels}),
    ]  # fmt: skip
    return [
        DrawnFigure(title, draw_lines(f"{prefix}f{number}", curves, label, **options))
        for number, (title, curves, label, options) in enumerate(plans)
        if curves
    ]


def _bands(series: Mapping[str, Series]) -> list[Curve]:
    """Return the curves of the bands by increasing timestep. Those of held-out images are dashed.

    Only the first curve of a band has a label.
    """
    found = sorted((int(band[3]), band[1], band[2], name) for name in series if (band := _BAND.fullmatch(name)))
    curves: list[Curve] = []
    colours: dict[str, int] = {}
    for _, split, band, name in found:
        held_out, label = split == "val", "" if band in colours else band
        colour = colours.setdefault(band, len(colours))
        curves.append(Curve(label, *series[name], not held_out, held_out, held_out, colour))
    return curves


def _watched(series: Mapping[str, Series], metric: str) -> list[str]:
    return [name for name in series if name.startswith("eval/") and name.endswith(f"/{metric}")]


def _curves(series: Mapping[str, Series], names: Sequence[str], markers: str = "markers") -> list[Curve]:
    return [Curve(name, *series[name], markers=bool(markers)) for name in names if name in series]


def draw_evaluation(evaluation: Evaluation, prefix: str) -> list[DrawnFigure]:
    """Return the drift and the loss ratio of each set by timestep."""
    plans = (
        ("Drift by timestep", "drift", lambda part: part.drift_at, True),
        ("Loss by timestep, tuned / base", "ratio", lambda part: part.ratio_at, False),
    )
    return [
        DrawnFigure(title, draw_lines(f"{prefix}{label}", [
            Curve(part.name, part.timesteps, select(part), markers=True) for part in evaluation.sets if part.timesteps
        ], label, xlabel="timestep", zero=zero))
        for title, label, select, zero in plans
    ]  # fmt: skip


def draw_comparison(runs: Sequence[tuple[str, Metrics]]) -> list[DrawnFigure]:
    """Return the figures of several runs in common axes."""
    return list(_comparison(runs))


def _comparison(runs: Sequence[tuple[str, Metrics]]) -> Iterator[DrawnFigure]:
    watched = sorted({name for _, metrics in runs for name in metrics.series if name.startswith("eval/")})
    plans: list[tuple[str, str, Callable[[Metrics], str | None], bool]] = [
        ("Loss of training", "loss", training_loss, True),
        ("Loss of held-out images", "loss", lambda metrics: next(iter(held_out_losses(metrics)), None), False),
        *[(name, name.rpartition("/")[2], lambda metrics, name=name: name, False) for name in watched],
        ("Learning rate", "learning rate",
         lambda metrics: next((n for n in metrics.series if n.startswith("lr-")), None), False),
        ("Seconds per step, mean of each epoch", "s", lambda metrics: "device/step_seconds", False),
        ("Peak memory of each epoch", "GiB", lambda metrics: "device/peak_memory_gib", False),
    ]  # fmt: skip
    for number, (title, label, select, noisy) in enumerate(plans):
        curves = [
            Curve(run, *metrics.series[name], noisy=noisy)
            for run, metrics in runs
            if (name := select(metrics)) in metrics.series
        ]
        if curves:
            yield DrawnFigure(title, draw_lines(f"comparison{number}", curves, label))
