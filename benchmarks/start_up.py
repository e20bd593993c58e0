#!/usr/bin/env python
"""From the command to the end of the first step: seconds and resident memory of each stage of `main.py`.

    python benchmarks/start_up.py --channels 128

A training checkpoint with random weights and AdamW's moments is written first, as a run of some steps leaves it; then
`main.py` resumes it in a process of its own, with clocks around what it calls. `--channels 320` is Stable Diffusion v1:
10.7 GB of disk and 15 GB of memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONFIG = "finetune_stable_diffusion.yaml"
# What main.py calls, in order, and what that stage is.
STAGES = {
    "import": ("ldm.training.trainer", "merge_config"),
    "read": ("ldm.training.resume", "read_training_checkpoint"),
    "build and load": ("ldm.training.resume", "build_from"),
    "trainer": ("ldm.training.trainer", "build_trainer"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128, help="model_channels of the UNet (default: 128)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)  # a worker's: the arguments of main.py
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.train:
        print(json.dumps(start(options.train)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # Linux hands a parent's peak on to its children
            arguments = pool.apply(prepare, (folder, options))
        size = (folder / "start.ckpt").stat().st_size
        worker = [sys.executable, __file__, "--train", json.dumps(arguments)]
        done = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
        report(json.loads(done.stdout.splitlines()[-1]), size)


def prepare(folder: Path, options: argparse.Namespace) -> list[str]:
    """Write a checkpoint and shards; returns the arguments of main.py."""
    import torch

    from benchmarks.recipe_full_size import write_shard
    from ldm.checkpoint import save_checkpoint
    from ldm.config.load import build_model, load_config
    from ldm.release.fresh import fresh_checkpoint
    from ldm.release.graft import Graft

    write_shard(folder / "shards", 2, options.size // 8)
    overrides = [f"model.params.unet_config.params.model_channels={options.channels}"]
    model = build_model(load_config([CONFIG], overrides))
    moments = {
        number: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
        for number, p in enumerate(model.trained_parameters())
    }
    groups = torch.optim.AdamW(model.trained_parameters(), lr=1e-6, fused=True).state_dict()["param_groups"]
    content = fresh_checkpoint(Graft(model.state_dict()))
    save_checkpoint(content | {"optimizer_states": [{"state": moments, "param_groups": groups}]}, folder / "start.ckpt")
    data = {"training_urls": folder / "shards/shard.tar", "val_urls": "null", "num_workers": 0, "batch_size": 1}
    overrides += [f"data.params.{key}={value}" for key, value in data.items()]
    overrides.append("lightning.callbacks.image_logger.params.disabled=True")
    flags = f"--resume {folder / 'start.ckpt'} --base {CONFIG} -t --no-test --max_steps 1 --enable_checkpointing False"
    return [*flags.split(), "--logdir", str(folder / "logs"), *overrides]


def start(arguments: list[str]) -> list[tuple[str, float, float]]:
    """Run main.py: (stage, seconds since the process began, highest resident GB until then) as each stage ends."""
    import psutil

    began = psutil.Process().create_time()
    stages: list[tuple[str, float, float]] = []

    def mark(stage: str) -> None:
        stages.append((stage, time.time() - began, peak()))

    def marking(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            result = function(*given, **named)
            mark(stage)
            return result

        return call

    sys.argv = ["main.py", *arguments]
    for stage, (module, name) in STAGES.items():
        module = importlib.import_module(module)
        setattr(module, name, marking(stage, getattr(module, name)))
    from ldm.models.diffusion.ddpm import LatentDiffusion

    LatentDiffusion.on_train_start = marking("fit starts", LatentDiffusion.on_train_start)
    LatentDiffusion.optimizer_step = marking("first step", LatentDiffusion.optimizer_step)
    importlib.import_module("main").main()
    return stages


def peak() -> float:
    """The highest resident set of this process so far, GB."""
    import torch

    from ldm.callbacks.device import peak_memory

    return peak_memory(torch.device("cpu")) / 1e9


def report(stages: list[tuple[str, float, float]], checkpoint: int) -> None:
    print(f"{os.cpu_count()} cores; training checkpoint {checkpoint / 1e9:.2f} GB")
    print(f"{'stage':<16} {'seconds':>8} {'so far':>8} {'peak GB':>8} {'/ ckpt':>7}")
    before = 0.0
    for stage, seconds, memory in stages:
        ratio = memory * 1e9 / checkpoint
        print(f"{stage:<16} {seconds - before:8.2f} {seconds:8.2f} {memory:8.2f} {ratio:7.2f}")
        before = seconds


if __name__ == "__main__":
    main()
