"""A chart's axes, drawn with Pillow: a scale, its ticks, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from PIL import ImageDraw, ImageFont

Point = tuple[float, float]

INK, PALE = "#333333", "#dddddd"
TICK_TEXT, TITLE_TEXT = 22, 28  # pixels, in charts that are drawn at twice their size


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from `low` or below to `high` or above, about `count` steps of 1, 2 or 5 times a power of 10."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


class Axes:
    """A titled chart in a box (left, top, right, bottom) whose vertical scale holds `values`."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, values: Iterable[float]
    ) -> None:
        self.draw = draw
        left, top, right, bottom = box
        self.left, self.top, self.right, self.bottom = left + 110, top + 60, right - 20, bottom - 50
        values = list(values)
        marks = ticks(min(values), max(values))
        self.low, self.high = marks[0], marks[-1]
        draw.text((self.left, top), title, INK, font(TITLE_TEXT))
        for mark in marks:
            draw.line([(self.left, self.y(mark)), (self.right, self.y(mark))], PALE, 2)
            draw.text((self.left - 12, self.y(mark)), f"{mark:.4g}", INK, font(TICK_TEXT), anchor="rm")

    def y(self, value: float) -> float:
        """The pixel row of `value`."""
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def x(self, index: int, count: int) -> float:
        """The pixel column of the middle of the place `index` of `count`."""
        return self.left + (index + 0.5) * (self.right - self.left) / count

    def bar(self, x: float, start: float, value: float, width: float, colour: str) -> None:
        """A bar from `start` to `value`."""
        top, bottom = sorted((self.y(start), self.y(value)))
        self.draw.rectangle([x - width / 2, top, x + width / 2, bottom + 1], colour)

    def whisker(self, x: float, low: float, high: float) -> None:
        """An interval's line with its two ends."""
        for value in (low, high):
            self.draw.line([(x - 12, self.y(value)), (x + 12, self.y(value))], INK, 3)
        self.draw.line([(x, self.y(low)), (x, self.y(high))], INK, 3)

    def line(self, points: Sequence[Point], colour: str) -> None:
        """A line through (column, value) points, each marked."""
        pixels = [(x, self.y(value)) for x, value in points]
        self.draw.line(pixels, colour, 5, joint="curve")
        for x, y in pixels:
            self.draw.ellipse([x - 7, y - 7, x + 7, y + 7], colour)

    def level(self, value: float) -> None:
        """A line across the chart."""
        self.draw.line([(self.left, self.y(value)), (self.right, self.y(value))], INK, 3)

    def label(self, x: float, text: str) -> None:
        """A word below the chart."""
        self.draw.text((x, self.bottom + 10), text, INK, font(TICK_TEXT), anchor="ma")
