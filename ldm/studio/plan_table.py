"""Results of `tools/plan_memory.py --card` as a table. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.events import START, read_events
from ldm.planning import AS_GIVEN, TIERS
from ldm.reporting.metrics import read_metrics
from ldm.reporting.run_folder import count_of
from ldm.studio.html_parts import html_table
from ldm.studio.runs import list_runs
from ldm.util import UserError

_GIB = 2**30


@dataclass(frozen=True)
class TierRow:
    """Tier with its largest batch, memory in GiB, memory in GiB by part, and images per second, None if unknown."""

    tier: str
    images: int
    device: float
    host: float
    parts: Mapping[str, float]
    speed: float | None = None


def tier_rows(found: Mapping[str, Any], speeds: Mapping[str, float]) -> list[TierRow]:
    """Return the rows of the planner's answer. `speeds` has the images per second that runs have measured, by tier."""
    return [
        TierRow(
            str(fit["tier"]),
            int(fit["images"]),
            fit["peak"] / _GIB,
            fit["host"] / _GIB,
            {str(part): size / _GIB for part, size in fit.get("parts", {}).items()},
            speeds.get(str(fit["tier"])),
        )
        for fit in found["tiers"]
    ]


def tiers_html(rows: Sequence[TierRow], use: str | None) -> str:
    """Return a table of the tiers. `use` is the one to choose."""
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    head = ["tier", "largest batch", "GPU, GiB", *parts, "host, GiB", "images/s, measured here"]
    lines = [
        [row.tier, row.images or "does not fit", row.device, *(row.parts.get(part, 0.0) for part in parts), row.host,
         row.speed or "–"]
        for row in rows
    ]  # fmt: skip
    return html_table(head, lines, [number for number, row in enumerate(rows) if row.tier == use])


def advice(rows: Sequence[TierRow], use: str | None, minutes: float) -> str:
    """Return what to choose, and what a time budget of `minutes` is enough for; 0 for no budget."""
    if use is None:
        return "Nothing fits: take a smaller size, or a card with more memory."
    row = next(row for row in rows if row.tier == use)
    tier = "no tier" if use == AS_GIVEN else f"the tier {use}"
    text = f"Choose {tier}, with up to {row.images} images per step: the fastest that fits."
    if minutes and row.speed:
        text += f" In {minutes:g} minutes it sees about {minutes * 60 * row.speed:,.0f} images."
    elif minutes:
        text += f" The training ends after {minutes:g} minutes; the speed here is known after the first run."
    return text


def measured_speeds(logs: Path, base: str) -> dict[str, float]:
    """Return the images per second by tier, each from its newest run under `logs` with the training config `base`."""
    speeds: dict[str, float] = {}
    for name in list_runs(logs):
        with suppress(UserError, OSError):
            events, _ = read_events(logs / name)
            start = next((event for event in reversed(events) if event["kind"] == START), {})
            images = count_of(start, "images_per_step")
            series = read_metrics(logs / name, []).series.get("device/step_seconds")
            configs = {Path(str(word)).name for word in start.get("command") or ()}
            if images and series and Path(base).name in configs:
                tier = next((tier for tier in TIERS if tier in configs), AS_GIVEN)
                speeds.setdefault(tier, images / statistics.median(series.values))
    return speeds
