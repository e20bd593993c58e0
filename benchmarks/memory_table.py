#!/usr/bin/env python
"""Table of the predicted memory of every family and tier, as docs/memory.md has it.

A cell is what `python tools/plan_memory.py --base CONFIG TIER --batch 1` predicts in GiB: tensors on the GPU and, where
the weights stay on the host, tensors in host memory.

    python benchmarks/memory_table.py
    python benchmarks/memory_table.py --families sdxl --tiers lean.yaml smallest.yaml
    python benchmarks/memory_table.py --families sd1 --tiers lora.yaml 'lean.yaml lora.yaml' 'smallest.yaml lora.yaml'

The whole table takes minutes of a processor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from ldm.config.load import load_config
from ldm.planning.card import GIB
from ldm.planning.ledger import HOST
from ldm.planning.step import on_device, peak_of_step
from ldm.release.families import FAMILIES, Family

FOUR_BITS = "model.params.optimizer_config.params.optimizer.target=ldm.optim.low_bit.AdamW4bit"
# Column of the table → what follows the config on the command line.
TIERS: dict[str, list[str]] = {
    "no tier": [],
    "fast.yaml": ["fast.yaml"],
    "lean.yaml": ["lean.yaml"],
    "lean.yaml, 4-bit": ["lean.yaml", FOUR_BITS],
    "minimal.yaml": ["minimal.yaml"],
    "smallest.yaml": ["smallest.yaml"],
}
# Columns of the table of LoRA trainings.
LORA_TIERS = {
    "lora.yaml": ["lora.yaml"],
    "lean.yaml lora.yaml": ["lean.yaml", "lora.yaml"],
    "smallest.yaml lora.yaml": ["smallest.yaml", "lora.yaml"],
}


def predicted(family: Family, tier: str) -> dict[str, int]:
    """Return `peak_of_step` for one image of the family's size under a column of the table."""
    words = [family.finetune_config, *(TIERS | LORA_TIERS)[tier]]
    overrides = [word for word in words if "=" in word]
    return peak_of_step(load_config([word for word in words if "=" not in word], overrides), images=1)


def cell(peak: dict[str, int], is_streamed: bool) -> str:
    device = f"{on_device(peak) / GIB:.2f}"
    return f"{device}, host {peak[HOST] / GIB:.1f}" if is_streamed else device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--tiers", nargs="+", choices=[*TIERS, *LORA_TIERS], default=[*TIERS], metavar="TIER")
    options = parser.parse_args()
    print("| family | config | size |", " | ".join(options.tiers), "|")
    print("|---" * (3 + len(options.tiers)) + "|")
    for key in options.families:
        family = FAMILIES[key]
        print(f"| {family.name} | `{family.finetune_config}` | {family.size}", end="", flush=True)
        for tier in options.tiers:
            is_streamed = tier.startswith(("minimal.yaml", "smallest.yaml"))
            print(" |", cell(predicted(family, tier), is_streamed), end="", flush=True)
        print(" |")


if __name__ == "__main__":
    main()
