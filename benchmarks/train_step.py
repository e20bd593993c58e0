#!/usr/bin/env python
"""Speed and peak memory of a training step of the Stable Diffusion v1 UNet: our tiers compared with diffusers.

Each side runs in its own process, so that no side pays for another's memory. The sides take turns, so that a drift in
the machine's speed slows all of them. Shapes, batch, precision and AdamW are the same; weights are random. The same
command measures a CPU and a GPU.

    python benchmarks/train_step.py --size 512 --batch 1 --precision bf16 --rounds 3
    python benchmarks/train_step.py --sides fast diffusers-compiled --size 512 --batch 64 --precision bf16 --steps 20

Sides:

- plain: the recipe without a tier, with the given options.
- in-backward: plain, with AdamW stepped within backward.
- fast, lean, minimal, smallest: the recipe with that config on top. lean and smallest always use bfloat16 weights and
  their own optimizer.
- diffusers: diffusers' UNet with the given options.
- diffusers-compiled: diffusers' UNet with channels last, compiled as a whole.

On a CPU our sides keep freed memory, as main.py does. The sides of diffusers do so only with --keep-memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TIERS = ("fast", "lean", "minimal", "smallest")
OURS = ("plain", "in-backward", *TIERS)
PEERS = ("diffusers", "diffusers-compiled")
CONTEXT = (77, 768)
ADAMW = {"target": "torch.optim.AdamW", "params": {"fused": True}}
IN_BACKWARD = {"target": "ldm.optim.InBackward", "params": {"optimizer": ADAMW}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=(*OURS, *PEERS), default=["plain", "diffusers"], metavar="SIDE",
                        help=f"from {', '.join((*OURS, *PEERS))} (default: plain diffusers)")  # fmt: skip
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels (default 512)")
    parser.add_argument("--batch", type=int, default=1, help="images per step (default 1)")
    parser.add_argument("--channels", type=int, default=320, help="model_channels; 320 is SD v1 (default 320)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast (default fp32)")
    parser.add_argument("--checkpointing", action="store_true", help="plain, diffusers: recompute activations")
    parser.add_argument("--channels-last", action="store_true", help="plain, diffusers: feature maps as NHWC")
    parser.add_argument("--keep-memory", action="store_true", help="on a CPU: keep freed memory for diffusers too")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the timed ones (default 2)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all sides (default 3)")
    parser.add_argument("--side", choices=(*OURS, *PEERS, "product"), help=argparse.SUPPRESS)  # for a worker process
    return parser.parse_args()


def build_ours(side: str, options: argparse.Namespace) -> tuple[Any, dict[str, Any], bool]:
    """Return our UNet of a tier, the tier's optimizer config, and True if the weights are bfloat16."""
    from ldm.config.load import load_config, plain
    from ldm.release.initialisation import without_initialisation
    from ldm.util import instantiate_from_config

    tier = [f"{side}.yaml"] if side in TIERS else []
    config = plain(load_config(["finetune_stable_diffusion.yaml", *tier]))
    params = config["model"]["params"]
    unet = params["unet_config"]
    unet["params"]["model_channels"] = options.channels
    if side not in TIERS:
        unet["params"] |= {"use_checkpoint": options.checkpointing, "channels_last": options.channels_last}
    if side == "minimal":
        unet["params"]["stream_dtype"] = options.precision
    with without_initialisation():
        module = instantiate_from_config(unet)
    optimizer = IN_BACKWARD if side == "in-backward" else params.get("optimizer_config") or ADAMW
    return module, optimizer, config["lightning"]["trainer"].get("precision") == "bf16-true"


def build_diffusers(side: str, options: argparse.Namespace) -> Any:
    """Return diffusers' UNet, set up as its documentation advises."""
    import diffusers
    import torch

    channels = tuple(options.channels * factor for factor in (1, 2, 4, 4))
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=channels, attention_head_dim=8, cross_attention_dim=CONTEXT[1]
    )
    if options.checkpointing:
        unet.enable_gradient_checkpointing()
    if side == "diffusers-compiled" or options.channels_last:
        unet.to(memory_format=torch.channels_last)
    if side == "diffusers-compiled":
        unet.compile()
    return unet


def work(options: argparse.Namespace) -> dict[str, float]:
    """Run one side; return its seconds per step, and its peak memory as reported by torch and by the driver."""
    import torch

    from ldm.callbacks.device import peak_memory
    from ldm.host_memory import keep_freed_memory
    from ldm.optim import build_optimizer
    from ldm.training.fit import use_tensor_cores

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.keep_memory or (device.type == "cpu" and options.side in OURS):
        keep_freed_memory()
    use_tensor_cores(device)
    torch.backends.cudnn.benchmark = True  # on a GPU, for all sides, as in fast.yaml
    torch.manual_seed(0)
    if options.side in OURS:
        unet, described, halves = build_ours(options.side, options)
    else:
        unet, described, halves = build_diffusers(options.side, options), ADAMW, False
    with torch.no_grad():  # weights of a usual scale for all sides, since initialisation was skipped
        for parameter in unet.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    unet.train().to(device, torch.bfloat16 if halves else torch.float32)
    optimizer = build_optimizer(described, unet.parameters(), 1e-5, "optimizer_config")
    latent = options.size // 8
    x = torch.randn(options.batch, 4, latent, latent, device=device)
    noise = torch.randn_like(x)
    t = torch.randint(0, 1000, (options.batch,), device=device)
    context = torch.randn(options.batch, *CONTEXT, device=device)
    autocast = options.precision == "bf16" and options.side not in ("lean", "minimal", "smallest")

    def closure() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            out = unet(x, t, context)
        loss = (getattr(out, "sample", out).float() - noise).square().mean()
        loss.backward()
        return loss

    driver = 0

    def step() -> float:
        nonlocal driver
        start = time.perf_counter()
        optimizer.step(closure)
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            driver = max(driver, total - free)
        return time.perf_counter() - start

    for _ in range(options.warm_up):
        step()
    seconds = [step() for _ in range(options.steps)]
    return {"seconds": min(seconds), "gib": peak_memory(device) / 2**30, "driver_gib": driver / 2**30}


def product_rate(options: argparse.Namespace) -> dict[str, float]:
    """Return the TFLOP/s of a large matrix product in the precision of the comparison."""
    import torch

    from ldm.training.fit import use_tensor_cores

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_tensor_cores(device)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return {"tflop_s": 2 * n**3 / best / 1e12}


def tflop_per_step(options: argparse.Namespace) -> float:
    """Return the TFLOP of a forward and a backward without recomputation, counted on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    resident = argparse.Namespace(**{**vars(options), "checkpointing": False})
    with torch.device("meta"):
        unet, _, _ = build_ours("plain", resident)
        x, context = torch.empty(options.batch, 4, *[options.size // 8] * 2), torch.empty(options.batch, *CONTEXT)
        with FlopCounterMode(display=False) as counter:
            unet(x, torch.zeros(options.batch), context).sum().backward()
    return counter.get_total_flops() / 1e12


def run_worker(side: str) -> dict[str, float]:
    """Run one side in its own process and return its figures."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parse_arguments()
    if options.side:
        print(json.dumps((product_rate if options.side == "product" else work)(options)))
        return
    import torch

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    flop, ceiling = tflop_per_step(options), run_worker("product")["tflop_s"]
    print(f"{flop:.3f} TFLOP per step; a matrix product reaches {ceiling:.2f} TFLOP/s here", flush=True)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides if number % 2 == 0 else reversed(options.sides):
            figures = run_worker(side)
            rounds[side].append(figures)
            print(f"round {number + 1}  {side:<18} {figures['seconds']:8.3f} s  {memory([figures])}", flush=True)
    for side, figures in rounds.items():
        seconds = statistics.median(entry["seconds"] for entry in figures)
        rate, speed = options.batch / seconds, flop / seconds
        shown = f"{rate:8.3f} img/s  {speed:7.3f} TFLOP/s ({speed / ceiling:4.0%})"
        print(f"{side:<18} {seconds:8.3f} s  {shown}  {memory(figures)}")
    compare(rounds)


def memory(figures: list[dict[str, float]]) -> str:
    """Format peak memory: on CUDA, of tensors and as reported by the driver; otherwise, of the process."""
    own, driver = (max(entry[key] for entry in figures) for key in ("gib", "driver_gib"))
    return f"peak {own:6.2f} GiB" + (f", reported by the driver {driver:6.2f} GiB" if driver else "")


def compare(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print, for each of our sides, the ratio to the faster of diffusers' sides in the same round."""
    peers = [rounds[side] for side in PEERS if side in rounds]
    if not peers:
        return
    fastest = [min(entry["seconds"] for entry in entries) for entries in zip(*peers, strict=True)]
    for side in OURS:
        if side in rounds:
            ratios = [b / a["seconds"] for a, b in zip(rounds[side], fastest, strict=True)]
            shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"diffusers' time / {side}'s time per round: {shown}; median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
