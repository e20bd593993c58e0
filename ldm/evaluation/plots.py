"""The results as one picture: bars of loss and drift, drift at each timestep, and samples of base and tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ldm.evaluation.axes import INK, TICK_TEXT, Axes, font
from ldm.evaluation.report import Row
from ldm.evaluation.statistics import Interval
from ldm.images.grid import save_png, to_images

# Told apart by the colour-blind too (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_WIDTH, _CHARTS = 1320, 330  # pixels: the figure's width, and the height of its charts
_SIDE, _GAP, _HEAD, _CAPTION = 96, 8, 30, 22  # of a sample, between them, of a set's title, of a caption


def draw_figure(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the figure to `path`, a PNG."""
    parts = [_charts(rows), *(_samples(row, _colour(index)) for index, row in enumerate(rows) if row.samples)]
    sheet = Image.new("RGB", (_WIDTH, 40 + sum(part.height for part in parts)), "white")
    ImageDraw.Draw(sheet).text((_GAP, 10), title, INK, font(16))
    top = 40
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    save_png(sheet, path)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _charts(rows: Sequence[Row]) -> Image.Image:
    """Three charts side by side, drawn at twice their size for smooth lines."""
    sheet = Image.new("RGB", (2 * _WIDTH, 2 * _CHARTS), "white")
    draw = ImageDraw.Draw(sheet)
    third, bottom = 2 * _WIDTH // 3, 2 * _CHARTS - 50
    _bars(draw, (0, 0, third, bottom), "loss, tuned / base", rows, lambda row: row.overall.loss_ratio, 1.0)
    _bars(
        draw, (third, 0, 2 * third, bottom), "drift of the noise prediction", rows, lambda row: row.overall.drift, 0.0
    )
    _lines(draw, (2 * third, 0, 3 * third, bottom), rows)
    left = 110
    for index, row in enumerate(rows):
        draw.rectangle([left, bottom + 12, left + 22, bottom + 34], _colour(index))
        text = f"{row.name}: {len(row.result.pictures)} pictures"
        draw.text((left + 34, bottom + 23), text, INK, font(TICK_TEXT), anchor="lm")
        left += 90 + int(draw.textlength(text, font(TICK_TEXT)))
    return sheet.reduce(2)


def _bars(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    title: str,
    rows: Sequence[Row],
    of: Callable[[Row], Interval],
    start: float,
) -> None:
    """A bar from `start` and its interval a set."""
    intervals = [of(row) for row in rows]
    axes = Axes(draw, box, title, [start, *(end for found in intervals for end in found if end is not None)])
    for index, (row, found) in enumerate(zip(rows, intervals, strict=True)):
        x = axes.x(index, len(rows))
        place = (axes.right - axes.left) / len(rows)
        axes.bar(x, start, found.value, place / 2, _colour(index))
        if found.low is not None and found.high is not None:
            axes.whisker(x, found.low, found.high)
        value, named = f"{found.value:.3g}", f"{row.name} {found.value:.3g}"
        axes.label(x, named if draw.textlength(named, font(TICK_TEXT)) < place else value)
    axes.level(start)


def _lines(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], rows: Sequence[Row]) -> None:
    """Drift over timesteps, a line a set."""
    drifts = [[at.drift.value for at in row.at_timesteps] for row in rows]
    axes = Axes(draw, box, "drift at each timestep", [0.0, *(value for drift in drifts for value in drift)])
    timesteps = rows[0].result.timesteps
    columns = [axes.x(index, len(timesteps)) for index in range(len(timesteps))]
    for index, drift in enumerate(drifts):
        axes.line(list(zip(columns, drift, strict=True)), _colour(index))
    every = -(-len(timesteps) // 8)  # more labels would touch
    for x, t in list(zip(columns, timesteps, strict=True))[::every]:
        axes.label(x, str(t))
    axes.level(0.0)


def _samples(row: Row, colour: str) -> Image.Image:
    """Pairs of base and tuned of a set, with their captions, as many to a line as fit."""
    assert row.result.base and row.result.tuned
    pairs = list(zip(*(to_images(drawn.pictures) for drawn in (row.result.base, row.result.tuned)), strict=True))
    width, height = 2 * _SIDE + 3 * _GAP, _SIDE + _CAPTION + _GAP
    columns = _WIDTH // width
    sheet = Image.new("RGB", (_WIDTH, _HEAD + -(-len(pairs) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    title = f"{row.name}: base (left) and tuned (right), same seeds; distance {row.samples['moved'].value:.3f}"
    draw.text((_GAP, 8), title, colour, font(14))
    for index, (pair, request) in enumerate(zip(pairs, row.result.tuned.requests, strict=True)):
        left, top = _GAP + index % columns * width, _HEAD + index // columns * height
        for picture in pair:
            sheet.paste(picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), (left, top))
            left += _SIDE + 2
        _caption(draw, (left - 2 * (_SIDE + 2), top + _SIDE + 3), request.prompt)
    return sheet


def _caption(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """As much of a caption as is as wide as two samples."""
    shown = text
    while shown and draw.textlength(shown, font(12)) > 2 * _SIDE:
        shown = shown[:-1]
    draw.text(place, shown if shown == text else f"{shown[:-1]}…", INK, font(12))
