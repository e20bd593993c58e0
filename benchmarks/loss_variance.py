#!/usr/bin/env python
"""Variance of the training loss of a batch, by the distribution of timesteps, for the base model of data/base.

The weights are fixed, so that a loss depends on the images, the timesteps and the noise of its batch alone. Loss-aware
timesteps first see batches until each of their bins has its losses.

    python benchmarks/loss_variance.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.config.load import load_config  # noqa: E402
from ldm.data.datasets import ImageCaptionDataset  # noqa: E402
from ldm.models.diffusion.latent import LatentDiffusion  # noqa: E402
from ldm.models.diffusion.timesteps import LossAware  # noqa: E402
from ldm.release.load import load_release  # noqa: E402

_TIMESTEPS = "ldm.models.diffusion.timesteps"
DISTRIBUTIONS: dict[str, Mapping[str, Any]] = {
    "uniform": {"target": f"{_TIMESTEPS}.Uniform"},
    "uniform, stratified": {"target": f"{_TIMESTEPS}.Uniform", "params": {"stratified": True}},
    "loss-aware": {"target": f"{_TIMESTEPS}.LossAware"},
    "loss-aware, stratified": {"target": f"{_TIMESTEPS}.LossAware", "params": {"stratified": True}},
}


def base_model(timestep_config: Mapping[str, Any]) -> LatentDiffusion:
    config = load_config([ROOT / "configs/latent-diffusion/demo_tiny_release.yaml"])
    config.model.params.timestep_config = timestep_config
    return load_release(ROOT / "data/base/emoji.safetensors", config).train()


@torch.no_grad()
def encode(model: LatentDiffusion, images: int) -> tuple[Tensor, Tensor]:
    """Return scaled latents (N, C, h, w) and captions (N, 77, D) of about `images` emoji, spread over all."""
    emoji = ImageCaptionDataset(ROOT / "data/emoji", size=64)
    chosen = [emoji[index] for index in range(0, len(emoji), max(1, len(emoji) // images))]
    pixels = torch.stack([torch.as_tensor(sample["image"]) for sample in chosen]).permute(0, 3, 1, 2)
    latents = [model.get_first_stage_encoding(model.encode_first_stage(part).mode()) for part in pixels.split(16)]
    return torch.cat(latents), model.get_learned_conditioning([sample["caption"] for sample in chosen])


@torch.no_grad()
def losses(model: LatentDiffusion, latents: Tensor, captions: Tensor, batch_size: int) -> Iterator[float]:
    """Yield the losses of random batches without end."""
    while True:
        chosen = torch.randint(0, len(latents), (batch_size,))
        yield model(latents[chosen], captions[chosen])[0].item()


def measure(name: str, encoded: tuple[Tensor, Tensor], batch_size: int, batches: int) -> Tensor:
    """Return the losses of `batches` batches, float64."""
    model = base_model(DISTRIBUTIONS[name])
    torch.manual_seed(0)
    stream = losses(model, *encoded, batch_size)
    distribution = model.timestep_distribution
    if isinstance(distribution, LossAware):
        while (model.timestep_counts[:-1] < distribution.history).any():
            next(stream)
    return torch.tensor([next(stream) for _ in range(batches)], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=400, help="batches per distribution (default 400)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per batch (default 8)")
    parser.add_argument("--images", type=int, default=64, help="number of images (default 64)")
    options = parser.parse_args()
    encoded = encode(base_model(DISTRIBUTIONS["uniform"]), options.images)
    print(f"| timesteps | mean loss of {options.batch_size} images | variance | of uniform |\n|---|---|---|---|")
    expected = None
    for name in DISTRIBUTIONS:
        found = measure(name, encoded, options.batch_size, options.batches)
        expected = expected or found.var().item()
        print(f"| {name} | {found.mean():.4f} | {found.var():.2e} | {found.var() / expected:.2f} |", flush=True)


if __name__ == "__main__":
    main()
