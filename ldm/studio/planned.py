"""Results of `tools/plan_memory.py --card` as a table. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

_GIB = 2**30


@dataclass(frozen=True)
class TierRow:
    """Tier with its largest batch, memory in GiB, and memory in GiB by part."""

    tier: str
    images: int
    device: float
    host: float
    parts: Mapping[str, float]


def tier_rows(found: Mapping[str, Any], base: str) -> list[TierRow]:
    """Return the rows of the planner's answer, as JSON."""
    return [
        TierRow(
            str(fit["tier"]),
            int(fit["images"]),
            fit["peak"] / _GIB,
            fit["host"] / _GIB,
            {str(part): size / _GIB for part, size in fit.get("parts", {}).items()},
        )
        for fit in found["tiers"]
    ]


def tiers_html(rows: Sequence[TierRow], use: str | None) -> str:
    """Return a table of the tiers. `use` is the one to choose."""
    parts = list(dict.fromkeys(part for row in rows for part in row.parts))
    head = ["tier", "largest batch", "GPU, GiB", *parts, "host, GiB"]
    lines = [
        Markup('<tr{}><th scope="row">{}</th>{}</tr>').format(
            Markup(' class="studio-good"') if row.tier == use else "",
            row.tier,
            Markup("").join(Markup('<td class="number">{}</td>').format(cell) for cell in (
                row.images or "does not fit", f"{row.device:.2f}", *(f"{row.parts.get(part, 0):.2f}" for part in parts),
                f"{row.host:.2f}",
            )),
        )
        for row in rows
    ]  # fmt: skip
    columns = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in head)
    body = Markup("").join(lines)
    return str(Markup('<div class="studio-scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>')
               .format(columns, body))  # fmt: skip


def advice(rows: Sequence[TierRow], use: str | None) -> str:
    """Return what to choose."""
    if use is None:
        return "Nothing fits: take a smaller size, or a card with more memory."
    row = next(row for row in rows if row.tier == use)
    tier = "no tier" if use == "as given" else f"the tier {use}"
    return f"Choose {tier}, with up to {row.images} images per step: the fastest that fits."
