#!/usr/bin/env python
"""Speed of convolutions of Stable Diffusion's UNet on the CPU: torch's own and a matrix product, forward and backward.

`ldm.modules.diffusionmodules.convolution` chooses between the two by these results.

    python benchmarks/cpu_convolution.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from ldm.host_memory import keep_freed_memory
from ldm.modules.diffusionmodules.convolution import Conv2d

# batch, channels in, channels out, height and width in pixels, kernel, stride
SHAPES = (
    (1, 1280, 1280, 4, 3, 1),
    (1, 2560, 1280, 8, 3, 1),
    (1, 1280, 1280, 8, 3, 1),
    (4, 1280, 1280, 8, 3, 1),
    (1, 1280, 1280, 8, 3, 2),
    (1, 1280, 1280, 16, 3, 1),
    (1, 1920, 1280, 16, 3, 1),
    (4, 1920, 1280, 16, 3, 1),
    (1, 640, 640, 16, 3, 1),
    (1, 1920, 640, 16, 3, 1),
    (1, 640, 640, 32, 3, 1),
    (1, 320, 320, 32, 3, 1),
    (1, 1280, 1280, 8, 1, 1),
    (1, 640, 640, 16, 1, 1),
    (4, 640, 640, 16, 1, 1),
    (1, 1920, 640, 16, 1, 1),
    (1, 320, 320, 32, 1, 1),
    (1, 640, 320, 32, 1, 1),
    (4, 320, 320, 32, 1, 1),
    (1, 960, 320, 64, 1, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6, help="repeats; the best one is reported (default 6)")
    options = parser.parse_args()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds, best of {options.repeats}")
    for precision in ("bf16", "fp32"):
        for shape in SHAPES:
            batch, c_in, c_out, side, kernel, stride = shape
            module = Conv2d(c_in, c_out, kernel, stride, kernel // 2)
            x = torch.randn(batch, c_in, side, side, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            own = measure(module, super(Conv2d, module).forward, x, options.repeats)
            product = measure(module, module._as_product, x, options.repeats)
            weights = c_in * c_out / (batch * (side // stride) ** 2)
            chosen = "product" if module._is_faster_as_product(x) else "torch's"
            print(f"{precision} {shape!s:<28}{weights:7.0f} per pixel, torch's {own:7.1f}  product {product:7.1f}  "
                  f"ratio {own / product:5.2f}  chosen: {chosen}", flush=True)  # fmt: skip


def measure(module: Conv2d, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, repeats: int) -> float:
    """Return the milliseconds of a forward and a backward (input, weights and bias): the best of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        module.zero_grad()
        x = x.detach().requires_grad_()
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16, cache_enabled=False):
            out = forward(x)
        out.backward(out.detach())
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


if __name__ == "__main__":
    main()
