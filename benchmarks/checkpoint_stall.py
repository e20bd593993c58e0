#!/usr/bin/env python
"""Time that training spends on writing a checkpoint, and the interval that keeps it a small fraction.

    python benchmarks/checkpoint_stall.py --folder /somewhere/on/the/disk --gib 2

The benchmark times five actions:

- the copy after which training continues, while a thread writes it;
- the start of a copy that is made beside the next forward and backward pass, as of weights that stay on the host;
- a checkpoint written as training writes it, with checksums, a sync to the disk and a rename;
- a plain write of the same bytes with a sync;
- the checksums alone.

A full fine-tune of SD v1 in float32 with AdamW writes 10.6 GB.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from ldm.callbacks.background_writer import BackgroundWriter
from ldm.checkpoint import PickledCheckpoint, save_checkpoint
from ldm.cli.run import run

log = logging.getLogger(__name__)

FULL_SIZE = 10.6e9  # bytes
SHARE = 0.05  # of the training time; above this share, training logs a warning
COPY, WRITE = "a copy in host memory", "a checkpoint as training writes it"
START = "the start of a copy beside the next step"
STEP_SECONDS = (0.2, 1.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder to write the files in; they are removed")
    parser.add_argument("--gib", type=float, default=2.0, help="size of a checkpoint (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats; the median is reported (default: 3)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tensors = [torch.randn(1 << 22) for _ in range(max(1, int(options.gib * 64)))]  # 16 MiB each
    stalls: dict[str, float] = {}  # seconds for `FULL_SIZE`
    size = sum(tensor.nbytes for tensor in tensors)
    path = options.folder / "stall.ckpt"

    def write_bare() -> None:
        with path.open("wb", buffering=0) as file:
            for tensor in tensors:
                file.write(tensor.numpy())
            os.fsync(file.fileno())

    def sum_up() -> None:
        for tensor in tensors:
            zlib.crc32(tensor.numpy())

    content = {"state_dict": dict(enumerate(tensors))}
    writer = BackgroundWriter()

    def copy(later: bool) -> None:
        writer.start(PickledCheckpoint.of(content), lambda _: None, copy_later=later)

    actions: dict[str, Callable[[], None]] = {
        COPY: lambda: copy(later=False),
        START: lambda: copy(later=True),
        WRITE: lambda: save_checkpoint(content, path),
        "a plain write of the same bytes, synced": write_bare,
        "the checksums alone": sum_up,
    }
    for name, action in actions.items():
        seconds = statistics.median(_seconds(action, writer) for _ in range(options.repeats))
        log.info("%-41s %6.2f s, %.2f GB/s", name, seconds, size / 1e9 / seconds)
        stalls[name] = seconds * FULL_SIZE / size
    path.unlink()
    for name, step in itertools.product((COPY, WRITE), STEP_SECONDS):
        log.info("%s, %.1f GB in %.1f s: at %.1f s per step, %.0f %% of the time if every %d steps",
                 name, FULL_SIZE / 1e9, stalls[name], step, 100 * SHARE,
                 round(stalls[name] * (1 / SHARE - 1) / step))  # fmt: skip


def _seconds(action: Callable[[], None], writer: BackgroundWriter) -> float:
    """Return the seconds of `action`, without those of the thread that it may start."""
    began = time.perf_counter()
    action()
    seconds = time.perf_counter() - began
    writer.finish()
    return seconds


if __name__ == "__main__":
    run(main)
