"""Tests of the predicted memory of every family and tier: the table of docs/memory.md, and the aims of SDXL."""

from __future__ import annotations

import re
from functools import cache

import pytest

from benchmarks.memory_table import TIERS, predicted
from ldm.planning.card import GIB
from ldm.planning.ledger import HOST
from ldm.planning.step import on_device
from ldm.release.families import FAMILIES
from tests.conftest import ROOT

# Families whose UNet differs from another's by the first convolution alone: two tiers are tested, to save minutes.
SIBLINGS = ("sd1_inpainting", "instruct_pix2pix", "sd2_inpainting", "sd2_depth", "sdxl_inpainting")
CHECKED = [
    (key, tier) for key in FAMILIES for tier in TIERS if key not in SIBLINGS or tier in ("lean.yaml", "smallest.yaml")
]


@cache
def table() -> dict[tuple[str, str], tuple[float, float | None]]:
    """The cells of docs/memory.md by family and tier: GiB of the device and, where it has any, of the host."""
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line.strip("| \n")) for line in page.splitlines() if line.startswith("| ")]
    names = {family.name: key for key, family in FAMILIES.items()}
    found = {}
    for row in rows:
        if row[0] not in names:
            continue
        family = FAMILIES[names[row[0]]]
        assert row[1:3] == [f"`{family.finetune_config or family.config}`", str(family.size)]
        for tier, cell in zip(TIERS, row[3:], strict=True):
            device, _, host = cell.partition(", host ")
            found[family.key, tier] = float(device), float(host) if host else None
    return found


@cache
def peak(key: str, tier: str) -> dict[str, float]:
    return {category: size / GIB for category, size in predicted(FAMILIES[key], tier).items()}


def test_the_table_has_every_family_and_tier() -> None:
    assert table().keys() == {(key, tier) for key in FAMILIES for tier in TIERS}


@pytest.mark.parametrize(("key", "tier"), CHECKED)
def test_the_predicted_memory_is_that_of_the_table(key: str, tier: str) -> None:
    device, host = table()[key, tier]
    assert on_device(peak(key, tier)) == pytest.approx(device, rel=0.02)
    if host is not None:
        assert peak(key, tier)[HOST] == pytest.approx(host, rel=0.02)


@pytest.mark.parametrize(
    ("tier", "most"),
    [("lean.yaml, 4-bit", 8.5), ("lean.yaml", 11.0), ("minimal.yaml", 1.2), ("smallest.yaml", 1.2)],
)
def test_sdxl_fits_small_cards(tier: str, most: float) -> None:
    """Allocated, batch 1 at 1024×1024."""
    assert FAMILIES["sdxl"].size == 1024
    assert on_device(peak("sdxl", tier)) <= most


@pytest.mark.parametrize(("key", "most"), [("sd1", 3.6), ("sdxl", 10.5)])
def test_the_smallest_tier_fits_small_computers(key: str, most: float) -> None:
    assert peak(key, "smallest.yaml")[HOST] <= most
