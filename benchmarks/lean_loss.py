#!/usr/bin/env python
"""Training loss of low-bit optimizers and of AdamW in float32, for a tiny UNet on latents of the images in data/emoji.

Every variant starts from the same weights and sees the same images, timesteps and noise. The reported loss is measured
on all images, again at the same timesteps and noise for every variant.

    python benchmarks/lean_loss.py --steps 200
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.data.datasets import ImageCaptionDataset  # noqa: E402
from ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from ldm.modules.diffusionmodules.streamed import StreamedUNetModel  # noqa: E402
from ldm.optim import build_optimizer  # noqa: E402
from ldm.release.load import load_release  # noqa: E402

BATCH = 8


def low_bit(bits: int, **params: Any) -> dict[str, Any]:
    """Return the config of AdamW with moments of `bits` bits, stepped inside backward."""
    inner = {"target": f"ldm.optim.low_bit.AdamW{bits}bit", "params": params}
    return {"target": "ldm.optim.InBackward", "params": {"optimizer": inner, "bucket_mb": 0.5}}


ADAMW = {"target": "torch.optim.AdamW", "params": {"fused": True}}
VARIANTS = {
    "fp32, AdamW": (torch.float32, ADAMW, UNetModel),
    "bf16, 8-bit AdamW, stochastic rounding": (torch.bfloat16, low_bit(8), UNetModel),
    "bf16, 4-bit AdamW, stochastic rounding": (torch.bfloat16, low_bit(4), UNetModel),
    "the 8-bit one, weights streamed": (torch.bfloat16, low_bit(8, keyed_rounding=True), StreamedUNetModel),
    "bf16, 8-bit AdamW, rounding to nearest": (torch.bfloat16, low_bit(8, bf16_stochastic_round=False), UNetModel),
    "bf16, AdamW": (torch.bfloat16, ADAMW, UNetModel),
}


class Task:
    """Latents (N, C, h, w) of about `images` emoji, the base model's schedule, and a UNet to train."""

    def __init__(self, images: int, channel_mult: Sequence[int]) -> None:
        base = load_release(
            ROOT / "data/base/emoji.safetensors", ROOT / "configs/latent-diffusion/demo_tiny_release.yaml"
        )
        emoji = ImageCaptionDataset(ROOT / "data/emoji", size=64)
        chosen = range(0, len(emoji), len(emoji) // images)
        pixels = torch.stack([torch.as_tensor(emoji[index]["image"]) for index in chosen]).permute(0, 3, 1, 2)
        posteriors = [base.encode_first_stage(part) for part in pixels.split(BATCH)]
        self.latents = torch.cat([base.get_first_stage_encoding(posterior.mode()) for posterior in posteriors])
        self.alphas_cumprod = base.alphas_cumprod
        self.channel_mult = channel_mult

    def unet(self, network: type[nn.Module] = UNetModel) -> nn.Module:
        torch.manual_seed(0)
        return network(
            image_size=self.latents.shape[-1],
            in_channels=self.latents.shape[1],
            out_channels=self.latents.shape[1],
            model_channels=32,
            attention_resolutions=[len(self.channel_mult)],
            num_res_blocks=1,
            channel_mult=self.channel_mult,
            num_heads=2,
        )

    def loss(self, unet: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Return the simple loss of the `chosen` latents at sampled timesteps and noise (arXiv:2006.11239, eq. 14)."""
        x_start = self.latents[chosen]
        t = torch.randint(0, len(self.alphas_cumprod), (len(chosen),), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator)
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        output = unet(alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise, t)
        return (output.float() - noise).square().mean()

    def trained_loss(
        self, dtype: torch.dtype, optimizer_config: Mapping[str, Any], network: type[nn.Module], steps: int, lr: float
    ) -> float:
        """Train a UNet of `dtype` for `steps`; return its mean loss over all latents and four noise samples each."""
        unet = self.unet(network).to(dtype)
        optimizer = build_optimizer(optimizer_config, unet.parameters(), lr, "optimizer_config")
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(2)  # for stochastic rounding

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(unet, torch.randint(0, len(self.latents), (BATCH,), generator=generator), generator)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        generator = torch.Generator().manual_seed(3)
        everything = torch.arange(len(self.latents))
        with torch.no_grad():
            return sum(self.loss(unet, everything, generator).item() for _ in range(4)) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default 200)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate (default 3e-4)")
    parser.add_argument("--images", type=int, default=48, help="number of images to train on (default 48)")
    options = parser.parse_args()
    task = Task(options.images, channel_mult=(1, 2))
    expected = None
    for name, variant in VARIANTS.items():
        start = time.perf_counter()
        loss = task.trained_loss(*variant, options.steps, options.lr)
        expected = expected or loss
        seconds = time.perf_counter() - start
        print(f"{name:<40} loss {loss:.5f}  {loss / expected - 1:+7.2%}  {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
