#!/usr/bin/env python
"""A training step of the Stable Diffusion v1 UNet, ours beside diffusers': time, TFLOP/s and peak memory.

Each side runs in a process of its own, in turn, so that neither pays for the other's memory and a machine whose speed
drifts slows both. Same shapes, precision, optimizer (fused AdamW) and checkpointing; random weights.

    python benchmarks/train_step.py --size 512 --batch 1 --precision bf16 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIDES = ("ours", "diffusers")
CONTEXT = (77, 768)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels a side (default 512)")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step (default 1)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast (default fp32)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--channels-last", action="store_true", help="NHWC weights and inputs")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round, after one warm-up (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides (default 3)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a worker's
    return parser.parse_args()


def build_ours(checkpointing: bool) -> Callable:
    from ldm.training.config import load_config, plain
    from ldm.training.release import without_initialisation
    from ldm.util import instantiate_from_config

    config = plain(load_config(["finetune_stable_diffusion.yaml"]).model.params.unet_config)
    config["params"]["use_checkpoint"] = checkpointing
    with without_initialisation():
        return instantiate_from_config(config)


def build_diffusers(checkpointing: bool) -> Callable:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768
    )
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def work(options: argparse.Namespace) -> dict[str, float]:
    """Run one side and return its figures."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    unet = (build_ours if options.side == "ours" else build_diffusers)(options.checkpointing)
    with torch.no_grad():  # weights of a usual size, the same for both; skipped initialisation leaves garbage
        for parameter in unet.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    unet.train().to(device)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    unet.to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    latent = options.size // 8
    x = torch.randn(options.batch, 4, latent, latent, device=device).to(memory_format=memory_format)
    noise = torch.randn_like(x)
    t = torch.randint(0, 1000, (options.batch,), device=device)
    context = torch.randn(options.batch, *CONTEXT, device=device)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            out = unet(x, t, context)
        loss = (getattr(out, "sample", out).float() - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step()
    seconds = [step() for _ in range(options.steps)]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(seconds), "peak_gib": peak / 2**30}


def tflop_a_step(size: int, batch: int) -> float:
    """Operations of forward and backward, without recomputation, counted on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = build_ours(checkpointing=False)
        x, context = torch.empty(batch, 4, size // 8, size // 8), torch.empty(batch, *CONTEXT)
        with FlopCounterMode(display=False) as counter:
            unet(x, torch.zeros(batch), context).sum().backward()
    return counter.get_total_flops() / 1e12


def main() -> None:
    options = parse_arguments()
    if options.side:
        print(json.dumps(work(options)))
        return
    import torch

    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    flop = tflop_a_step(options.size, options.batch)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            figures = json.loads(done.stdout.splitlines()[-1])
            rounds[side].append(figures)
            print(
                f"round {number + 1}  {side:<10} {figures['seconds']:8.3f} s  {figures['peak_gib']:6.2f} GiB",
                flush=True,
            )
    for side, figures in rounds.items():
        seconds = statistics.median(entry["seconds"] for entry in figures)
        peak = max(entry["peak_gib"] for entry in figures)
        rate = options.batch / seconds
        print(f"{side:<10} {seconds:8.3f} s  {rate:8.3f} img/s  {flop / seconds:6.3f} TFLOP/s  peak {peak:6.2f} GiB")
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(rounds["ours"], rounds["diffusers"], strict=True)]
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"diffusers' time / ours, a round: {shown}; median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
