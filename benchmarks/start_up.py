#!/usr/bin/env python
"""Start-up of `main.py`, from the command to the end of the first step: seconds and resident memory per stage.

    python benchmarks/start_up.py --channels 128

The benchmark first writes a training checkpoint with random weights and AdamW's moments. Then `main.py` resumes it in
its own process, with clocks around the functions that it calls. `--channels 320` is Stable Diffusion v1 and needs
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
# Stages of main.py in order, each with the module and the name of the function that it calls.
STAGES = {
    "import": ("ldm.training.trainer", "merge_config"),
    "read": ("ldm.training.resume", "read_training_checkpoint"),
    "build and load": ("ldm.training.resume", "build_from"),
    "trainer": ("ldm.training.trainer", "build_trainer"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128, help="model_channels of the UNet (default: 128)")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default: 256)")
    parser.add_argument("--folder", type=Path, help="parent folder of the temporary files (default: the system's)")
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)  # for a worker process: main.py's arguments
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.train:
        print(json.dumps(start(options.train)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # on Linux a child inherits its parent's peak memory
            arguments = pool.apply(prepare, (folder, options))
        size = (folder / "start.ckpt").stat().st_size
        worker = [sys.executable, __file__, "--train", json.dumps(arguments)]
        done = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
        report(json.loads(done.stdout.splitlines()[-1]), size)


def prepare(folder: Path, options: argparse.Namespace) -> list[str]:
    """Write a checkpoint and shards; return the arguments of main.py."""
    import torch

    from benchmarks.recipe_full_size import write_shard
    from ldm.checkpoint import save_checkpoint
    from ldm.config.load import build_model, load_config
    from ldm.release.initial_checkpoint import checkpoint_at_start

    write_shard(folder / "shards", 2, options.size // 8)
    overrides = [f"model.params.unet_config.params.model_channels={options.channels}"]
    model = build_model(load_config([CONFIG], overrides))
    moments = {
        number: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
        for number, p in enumerate(model.trained_parameters())
    }
    groups = torch.optim.AdamW(model.trained_parameters(), lr=1e-6, fused=True).state_dict()["param_groups"]
    content = checkpoint_at_start(model.state_dict())
    save_checkpoint(content | {"optimizer_states": [{"state": moments, "param_groups": groups}]}, folder / "start.ckpt")
    data = {"training_urls": folder / "shards/shard.tar", "val_urls": "null", "num_workers": 0, "batch_size": 1}
    overrides += [f"data.params.{key}={value}" for key, value in data.items()]
    overrides.append("lightning.callbacks.image_logger.params.disabled=True")
    flags = f"--resume {folder / 'start.ckpt'} --base {CONFIG} -t --no-test --max_steps 1 --enable_checkpointing False"
    return [*flags.split(), "--logdir", str(folder / "logs"), *overrides]


def start(arguments: list[str]) -> list[tuple[str, float, float]]:
    """Run main.py; return (stage, seconds since process start, peak resident GB) at the end of each stage."""
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
    """Return the highest resident set of this process so far, in GB."""
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
