#!/usr/bin/env python
"""Peak memory of training steps on the CPU: AdamW in float32 and the lean tier's optimizer.

Each variant runs in its own process, on a narrow version of Stable Diffusion's UNet. The reported figure is the peak
memory of the process minus its memory before the UNet was built. On a CPU the low-bit step is not compiled. Its
temporary tensors, as large as the largest weight, therefore take a larger share here than on a GPU.

    python benchmarks/lean_memory.py --channels 128 --size 256
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VARIANTS = ("fp32, AdamW", "bf16, 8-bit AdamW in backward")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--channels", type=int, default=128, help="model_channels of the UNet; 320 is Stable Diffusion (default 128)"
    )
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default 256)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # for a worker process
    return parser.parse_args()


def work(options: argparse.Namespace) -> dict[str, float]:
    """Run two steps of one variant; return its number of parameters, and its peak memory in GiB."""
    import psutil
    import torch

    import ldm.optim.low_bit  # noqa: F401 - keeps the import of torchao out of the measurement
    from ldm.callbacks.device import peak_memory
    from ldm.config.load import load_config, plain
    from ldm.optim import build_optimizer
    from ldm.util import instantiate_from_config

    config = plain(load_config(["finetune_stable_diffusion.yaml", "lean.yaml"]).model.params)
    lean = options.variant != VARIANTS[0]
    chosen = config["optimizer_config"] if lean else {"target": "torch.optim.AdamW", "params": {"fused": True}}
    before = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if lean else torch.float32)  # avoids a float32 copy first
    unet = instantiate_from_config(config["unet_config"], model_channels=options.channels)
    torch.set_default_dtype(torch.float32)
    optimizer = build_optimizer(chosen, unet.parameters(), 1e-5, "optimizer_config")
    latent = options.size // 8
    x, noise = torch.randn(2, 1, 4, latent, latent)
    context, t = torch.randn(1, 77, 768), torch.tensor([500])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (unet(x, t, context).float() - noise).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    peak = peak_memory(torch.device("cpu")) - before
    return {"parameters": sum(p.numel() for p in unet.parameters()), "gib": peak / 2**30}


def main() -> None:
    options = parse_arguments()
    if options.variant:
        print(json.dumps(work(options)))
        return
    peaks = []
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        figures = json.loads(done.stdout.splitlines()[-1])
        peaks.append(figures["gib"])
        print(
            f"{variant:<32} {figures['parameters'] / 1e6:6.1f} M parameters  peak {figures['gib']:6.2f} GiB", flush=True
        )
    print(f"AdamW's peak / the lean optimizer's peak: {peaks[0] / peaks[1]:.2f}")


if __name__ == "__main__":
    main()
