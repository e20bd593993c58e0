#!/usr/bin/env python
"""Bytes of optimizer state per trained parameter, as docs/training.md has them.

Each optimizer steps one float32 weight of each shape in the UNet. The bytes of a weight's state count as often as its
shape occurs. The default UNet is that of Stable Diffusion v1, which takes a minute and 2 GB of memory.

    python benchmarks/optimizer_memory.py
    python benchmarks/optimizer_memory.py --base stable_diffusion_xl.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from ldm.config.load import load_config
from ldm.optim import build_optimizer
from ldm.util import instantiate_from_config

TARGETS = (
    "torch.optim.AdamW",
    "ldm.optim.low_bit.AdamW8bit",
    "ldm.optim.low_bit.AdamW4bit",
    "torch.optim.Adafactor",
    "pytorch_optimizer.Lion",
    "pytorch_optimizer.CAME",
    "pytorch_optimizer.Prodigy",
)


def state_bytes(target: str, shape: torch.Size) -> int:
    """Return the bytes of the tensors that the optimizer `target` keeps for a weight of `shape`."""
    weight = nn.Parameter(torch.ones(shape))
    optimizer = build_optimizer({"target": target}, [weight], 1.0, "optimizer_config")
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    saved = optimizer.state_dict()["state"]
    return sum(leaf.nbytes for leaf in tree_leaves(saved) if isinstance(leaf, Tensor))


def bytes_per_parameter(target: str, shapes: Mapping[torch.Size, int]) -> float:
    """Return the mean for a network that has each of `shapes` as often as given."""
    held = sum(count * state_bytes(target, shape) for shape, count in shapes.items())
    return held / sum(count * shape.numel() for shape, count in shapes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["stable_diffusion_v1.yaml"], metavar="CONFIG")
    options = parser.parse_args()
    with torch.device("meta"):
        unet = instantiate_from_config(load_config(options.base).model.params.unet_config)
    shapes = Counter(parameter.shape for parameter in unet.parameters())
    print("| target | bytes of state per parameter |\n|---|---|")
    for target in TARGETS:
        print(f"| `{target}` | {bytes_per_parameter(target, shapes):.2f} |", flush=True)


if __name__ == "__main__":
    main()
