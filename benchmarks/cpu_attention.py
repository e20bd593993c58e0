#!/usr/bin/env python
"""Speed of attention on the CPU: torch's fused kernel and plain matrix products, by length, in training and inference.

`ldm.modules.attention` chooses between the two by these results.

    python benchmarks/cpu_attention.py
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LENGTHS = (
    (16, 16),
    (16, 77),
    (32, 32),
    (64, 64),
    (64, 77),
    (128, 128),
    (256, 77),
    (256, 256),
    (1024, 77),
    (1024, 1024),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="batch size (default 16)")
    parser.add_argument("--heads", type=int, default=2, help="attention heads (default 2)")
    parser.add_argument("--features", type=int, default=64, help="features per head (default 64)")
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds per measurement (default 0.2)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds, best of three")
    for dtype in (torch.float32, torch.bfloat16):
        for queries, keys in LENGTHS:
            shape = (options.batch, options.heads)
            q = torch.randn(*shape, queries, options.features, dtype=dtype, requires_grad=True)
            k, v = (torch.randn(*shape, keys, options.features, dtype=dtype, requires_grad=True) for _ in range(2))
            line = f"{dtype!s:<15} {queries:4} x {keys:<4}"
            for what, backward in (("training", True), ("inference", False)):
                fused, plain = (
                    1e3 * min(measure(backend, q, k, v, backward, options.seconds) for _ in range(3))
                    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
                )
                line += f"   {what}: fused {fused:8.3f}  plain {plain:8.3f}  ratio {fused / plain:5.2f}"
            print(line, flush=True)


def measure(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backward: bool, least: float
) -> float:
    """Return the mean seconds of a forward, followed by a backward if `backward`.

    One warm-up run comes first. The timed runs take at least `least` seconds together.
    """

    def run() -> None:
        with sdpa_kernel(backend), torch.set_grad_enabled(backward):
            out = F.scaled_dot_product_attention(q, k, v)
            if backward:
                torch.autograd.grad(out.float().sum(), (q, k, v))

    run()
    repeats, start = 0, time.perf_counter()
    while time.perf_counter() - start < least:
        run()
        repeats += 1
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
