"""Tests of the predicted memory of every family and tier: the table of docs/memory.md, and the aims of SDXL."""

from __future__ import annotations

import re
from functools import cache

import pytest

from benchmarks.memory_table import LORA_TIERS, TIERS, predicted
from ldm.planning.card import GIB
from ldm.planning.ledger import HOST
from ldm.planning.step import on_device
from ldm.release.families import FAMILIES
from tests.conftest import ROOT

# (family, tier) → largest sums in GiB on the device and on the host.
AIMS = {
    ("sdxl", "lean.yaml, 4-bit"): (8.5, None),
    ("sdxl", "lean.yaml"): (11.0, None),
    ("sdxl", "minimal.yaml"): (1.2, None),
    ("sdxl", "smallest.yaml"): (1.2, 10.5),
    ("sd1", "smallest.yaml"): (None, 3.6),
}
# Families whose UNet is that of another, except for the channels that it reads.
SAME_UNET = {
    "sd1_inpainting": "sd1",
    "instruct_pix2pix": "sd1",
    "sd2_inpainting": "sd2_base",
    "sd2_depth": "sd2_base",
    "sdxl_inpainting": "sdxl",
}
# A prediction takes 20 s of a processor; benchmarks/memory_table.py makes all.
CHECKED = [
    ("sd1", "no tier"),
    ("sd1", "smallest.yaml"),
    ("sd1", "lean.yaml lora.yaml"),
    ("sd2_base", "lean.yaml"),
    ("sdxl", "minimal.yaml"),
]


@cache
def table() -> dict[tuple[str, str], tuple[float, float | None]]:
    """Return the cells of docs/memory.md by family and column: GiB of the device and, where it has any, of the host."""
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line.strip("| \n")) for line in page.splitlines() if line.startswith("| ")]
    names = {family.name: key for key, family in FAMILIES.items()}
    found, tiers = {}, []
    for row in rows:
        if row[:3] == ["family", "config", "size"]:
            tiers = [name.replace("`", "") for name in row[3:]]
        if row[0] not in names:
            continue
        family = FAMILIES[names[row[0]]]
        assert row[1:3] == [f"`{family.finetune_config}`", str(family.size)]
        for tier, cell in zip(tiers, row[3:], strict=True):
            device, _, host = cell.partition(", host ")
            found[family.key, tier] = float(device), float(host) if host else None
    return found


def test_the_table_has_every_family_and_tier() -> None:
    of_loras = {(key, tier) for key in ("sd1", "sdxl") for tier in LORA_TIERS}
    assert table().keys() == {(key, tier) for key in FAMILIES for tier in TIERS} | of_loras


@pytest.mark.parametrize("key", SAME_UNET)
def test_families_of_one_unet_need_the_same_memory(key: str) -> None:
    """In the table; test_fake_batch.py takes a step of each family at a small width."""
    for tier in TIERS:
        assert table()[key, tier] == pytest.approx(table()[SAME_UNET[key], tier], abs=0.015)


@pytest.mark.parametrize(("key", "tier"), CHECKED)
def test_the_predicted_memory_is_that_of_the_table(key: str, tier: str) -> None:
    """Allocated, batch 1 at the size of the family."""
    device, host = table()[key, tier]
    peak = {category: size / GIB for category, size in predicted(FAMILIES[key], tier).items()}
    assert on_device(peak) == pytest.approx(device, rel=0.02)
    assert host is None or peak[HOST] == pytest.approx(host, rel=0.02, abs=0.05)  # one digit after the point


@pytest.mark.parametrize(("key", "tier"), AIMS)
def test_the_table_is_within_the_aims(key: str, tier: str) -> None:
    device, host = table()[key, tier]
    most_on_device, most_on_host = AIMS[key, tier]
    assert most_on_device is None or device <= most_on_device
    assert most_on_host is None or host <= most_on_host


def test_the_aims_of_sdxl_are_at_1024_pixels() -> None:
    assert FAMILIES["sdxl"].size == 1024
