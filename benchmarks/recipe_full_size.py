#!/usr/bin/env python
"""Seconds and peak memory per stage of the recipe, at the full size of a family's release, on the CPU.

Weights are random.

    python benchmarks/recipe_full_size.py --folder recipe
    python benchmarks/recipe_full_size.py --folder recipe --family sdxl
    python benchmarks/recipe_full_size.py --folder recipe --prior --skip-training --latent-size 32

The stages are hack, one resumed optimizer step, and merge, run as a user would type them. Peak memory is the resident
set of each command, including memory-mapped pages. The benchmark needs about 32 GB of disk and frees it afterwards
unless --keep is given. --prior adds two stages before them: a prior of one prompt with eight stored predictions,
sampled in 50 steps, and on a pre-encoded image.

SDXL's release is in float16, as it is published. A step of it in float32 needs 45 GB, so the step is replaced by a
checkpoint whose UNet was multiplied by a number.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from ldm.checkpoint import Pending, in_memory, load_checkpoint, load_state_dict, save_checkpoint, save_state_dict
from ldm.checkpoint.keys import UNET
from ldm.cli.run import run
from ldm.shards import npy
from ldm.shards.writer import ShardWriter
from ldm.util import UserError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "finetune_stable_diffusion.yaml"
# Lists of released keys, file names, and types of the weights; None for the types in the list.
RELEASES: dict[str, tuple[str, str, torch.dtype | None]] = {
    "sd1": ("sd_v1_keys", "model.ckpt", None),
    "sdxl": ("sdxl_base_keys", "model.safetensors", torch.float16),
}
MAX_RSS = 24e9  # bytes, of any stage
MAX_RSS_OF_RELEASE = 1.3  # limit for hack and merge, as a multiple of the release's size


@dataclass
class Stage:
    """Time and memory that one command took."""

    name: str
    seconds: float
    peak_rss: int  # bytes
    moved: int  # bytes of the checkpoints that the stage reads and writes


def main() -> None:
    options = parse_arguments()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"--folder {folder}: the folder is not empty; give a new or an empty one")
    try:
        stages = run_recipe(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    report(stages)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new or empty folder for all files")
    parser.add_argument("--family", choices=RELEASES, default="sd1", help="family of the release (default: sd1)")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--latent-size", type=int, default=64, help="height and width of the latents (default: 64)")
    parser.add_argument("--samples", type=int, default=2, help="number of pre-encoded samples (default: 2)")
    parser.add_argument("--batch-size", type=int, default=1, help="batch size of the training step (default: 1)")
    parser.add_argument("--prior", action="store_true", help="make priors of one sample first (sd1 only)")
    parser.add_argument(
        "--skip-training",
        action="store_true",
        help="skip the training step and merge the untrained checkpoint; saves 24 GB",
    )
    options = parser.parse_args()
    if options.prior and options.family != "sd1":
        raise UserError(f"--prior: is for sd1 only; leave it out, or leave out --family {options.family}")
    return options


def run_recipe(folder: Path, options: argparse.Namespace) -> list[Stage]:
    keys, name, dtype = RELEASES[options.family]
    release, start = folder / name, folder / "start.ckpt"
    merged = folder / f"merged{release.suffix}"
    write_release(release, keys, dtype)
    size = release.stat().st_size
    log.info("release: %.2f GB", size / 1e9)

    stages = time_priors(folder, release, options) if options.prior else []
    hack = ["tools/hack_weights.py", "--release", release, "--out", start, "--base"]  # of the family
    stages.append(timed("hack", hack))
    stages[-1].moved = size + start.stat().st_size
    last = start
    if options.skip_training:
        pass
    elif options.family != "sd1":
        last = folder / "last.ckpt"
        write_moved(start, release, last)
    else:
        write_shard(folder / "shards", options.samples, options.latent_size)
        stages.append(timed("one step", training_command(folder, start, options)))
        last = next(folder.glob("logs/*/checkpoints/last.ckpt"))
        stages[-1].moved = start.stat().st_size + last.stat().st_size
    merge = ["tools/merge_release.py", "--train-ckpt", last, "--release", release, "--out", merged]
    stages.append(timed("merge", merge))
    stages[-1].moved = size + merged.stat().st_size
    check_merged(merged, release, trained=not options.skip_training)
    for stage in stages:
        if stage.name in ("hack", "merge") and stage.peak_rss > MAX_RSS_OF_RELEASE * size:
            ratio = f"{stage.peak_rss / size:.2f} times the release's size"
            raise UserError(f"{stage.name} took {ratio}; at most {MAX_RSS_OF_RELEASE} is allowed")
    return stages


def time_priors(folder: Path, release: Path, options: argparse.Namespace) -> list[Stage]:
    """Make a prior of one sample with eight predictions, by sampling and on an image."""
    size = str(8 * options.latent_size)
    write_shard(folder / "image", 1, options.latent_size)
    words = ["tools/make_prior.py", "--ckpt", release, "--prompt", "a photo of a cat", "--teacher", "8", "--out"]
    return [
        timed("prior, sampled", [*words, folder / "sampled/%06d.tar", "--H", size, "--W", size]),
        timed("prior, on an image", [*words, folder / "on_image/%06d.tar", "--shards", folder / "image/*.tar"]),
    ]


def training_command(folder: Path, start: Path, options: argparse.Namespace) -> list[str | Path]:
    data = {"training_urls": folder / "shards/shard.tar", "val_urls": "null", "test_urls": "null", "num_workers": 0}
    overrides = [f"data.params.{key}={value}" for key, value in {**data, "batch_size": options.batch_size}.items()]
    flags = ["-t", "--no-test", "--logdir", folder / "logs", "--max_steps", "1"]
    overrides.append("lightning.callbacks.image_logger.params.disabled=True")
    return ["main.py", "--resume", start, "--base", CONFIG, *flags, *overrides]


def timed(name: str, command: list[str | Path]) -> Stage:
    """Run a Python script of the checkout and wait for it. `ru_maxrss` is in KiB on Linux and in bytes elsewhere."""
    arguments = [sys.executable, *map(str, command)]
    log.info("$ %s", shlex.join(["python", *arguments[1:]]))
    begin = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{name} ended with exit code {process.returncode}")
    return Stage(name, seconds, usage.ru_maxrss * (1024 if sys.platform == "linux" else 1), 0)


def write_release(path: Path, keys: str, half: torch.dtype | None) -> None:
    """Write random weights under the keys and shapes of a released checkpoint, in the type `half` if there is one."""
    listed = json.loads((ROOT / f"tests/golden/{keys}.json").read_text(encoding="utf-8"))["keys"]

    def pending(shape: list[int], dtype: torch.dtype) -> Pending:
        dtype = half or dtype if dtype.is_floating_point else dtype
        if not dtype.is_floating_point:
            return Pending(
                tuple(shape), dtype, lambda: torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape)
            )
        return Pending(tuple(shape), dtype, lambda: (torch.randn(shape) * 0.02).to(dtype))

    torch.manual_seed(0)
    weights = {key: pending(shape, getattr(torch, dtype.split(".")[1])) for key, (shape, dtype) in listed.items()}
    save_state_dict(weights, path)


def write_moved(start: Path, release: Path, path: Path) -> None:
    """Write the training checkpoint `start` with other weights of the UNet to `path`, and remove `start`.

    The weights are read from `release`, so that the disk need not hold two training checkpoints.
    """
    content, released = load_checkpoint(start), load_state_dict(release)
    weights = {}
    for key, value in content.pop("state_dict").items():
        if key in released:
            factor = 1.01 if key.startswith(UNET) else 1

            def compute(key: str = key, dtype: torch.dtype = value.dtype, factor: float = factor) -> torch.Tensor:
                return in_memory(released[key]).to(dtype) * factor

            weights[key] = Pending(tuple(value.shape), value.dtype, compute)
        else:
            weights[key] = in_memory(value).clone()
        del value
    start.unlink()
    save_checkpoint({**content, "state_dict": weights}, path)


def write_shard(folder: Path, samples: int, latent_size: int, context: int = 768, pooled: int = 0) -> None:
    """Write a shard of random posteriors and text embeddings, and the encodings of the empty caption.

    `context` is the width of the text embeddings. With `pooled` above 0, samples are those of SDXL.
    """
    generator = np.random.default_rng(0)

    def encoded(*shape: int) -> bytes:
        return npy.encode(generator.standard_normal(shape).astype(np.float16))

    side = 8 * latent_size
    sizes = {"original_size": [side, side], "crop_top_left": [0, 0], "target_size": [side, side]}
    with ShardWriter(str(folder / "shard.tar"), samples) as writer:
        for index in range(samples):
            members = {"f8.npy": encoded(8, latent_size, latent_size), "t5.npy": encoded(77, context), "txt": b"noise"}
            if pooled:
                members |= {"pooled.npy": encoded(pooled), "json": json.dumps(sizes).encode()}
            writer.write(f"{index:06d}", members)
    (folder / "null.t5.npy").write_bytes(encoded(77, context))
    if pooled:
        (folder / "null.pooled.npy").write_bytes(encoded(pooled))


def check_merged(merged: Path, release: Path, trained: bool) -> None:
    """Raise `UserError` if tensors outside the UNet differ from the release, or none of the UNet after training."""
    new, old = load_state_dict(merged), load_state_dict(release)
    changed = {key for key in old if not torch.equal(new[key], old[key])}
    expected = {key for key in old if key.startswith("model.")} if trained else set()
    if new.keys() != old.keys() or not changed <= expected or (trained and not changed):
        raise UserError(f"{merged}: {len(changed)} weights differ from the release; expected {len(expected)}")
    log.info("merged: %d of %d tensors differ from the release, all of them in the UNet", len(changed), len(old))


def report(stages: list[Stage]) -> None:
    log.info("%-18s %10s %12s %12s", "stage", "seconds", "peak RSS GB", "MB/s")
    for stage in stages:
        rate = stage.moved / stage.seconds / 1e6
        log.info("%-18s %10.1f %12.2f %12.0f", stage.name, stage.seconds, stage.peak_rss / 1e9, rate)
    worst = max(stages, key=lambda stage: stage.peak_rss)
    if worst.peak_rss > MAX_RSS:
        raise UserError(f"{worst.name} took {worst.peak_rss / 1e9:.1f} GB; at most {MAX_RSS / 1e9:.0f} GB is allowed")


if __name__ == "__main__":
    run(main)
