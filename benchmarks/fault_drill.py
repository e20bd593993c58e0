#!/usr/bin/env python
"""Fault drill: kill a small run at random moments, fill its disk, truncate a shard, kill a data worker.

    python benchmarks/fault_drill.py --folder drill --kills 50

Each run has two data workers, accumulated gradients, dropped captions, an EMA and prior shards. The drill resumes a run
until it has all its steps. Then it compares losses, weights, EMA, optimizer state and counters with those of an
undisturbed run, bit for bit. A fault may cost the steps since the last checkpoint, and no more.

The full disk is a tmpfs, which only root may mount. Without root the drill logs that it skips this part.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from benchmarks.child_runs import read_losses, start
from ldm.checkpoint import load_checkpoint
from ldm.cli.run import run
from ldm.shards import npy
from ldm.shards.writer import ShardWriter
from ldm.util import UserError

log = logging.getLogger(__name__)

STEPS = 24  # of each run: four epochs
EVERY = 2  # steps between checkpoints
OPTIONS = (
    "-b demo_tiny.yaml -t --no-test --accumulate_grad_batches 2 --enable_model_summary False "
    f"--max_steps {STEPS} lightning.modelcheckpoint.params.every_n_train_steps={EVERY} "
    "model.params.unet_config.params.model_channels=32 model.params.unet_config.params.context_dim=8 "
    "model.params.first_stage_config.params.ddconfig.ch=32 "
    "lightning.callbacks.image_logger.params.disabled=True "
    "data.params.batch_size=2 data.params.num_workers=2 data.params.null_cond_dropout=0.2 "
    "data.params.training_urls={shards}/train-*.tar "
    "data.params.prior_urls={shards}/prior.tar data.params.prior_ratio=0.5"
)


class DrilledRun:
    """A run in `folder` that the drill starts and resumes as often as needed."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder = folder
        self.shards = shards
        self.losses = folder / "losses"
        self.output = folder / "output"
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def last(self) -> Path | None:
        """Path of the run's last.ckpt; None before the first checkpoint."""
        return next(self.folder.glob("logs/*/checkpoints/last.ckpt"), None)

    def start(self) -> BaseProcess:
        """Start the run, or resume it from its checkpoint if there is one."""
        if self.last is None:
            shutil.rmtree(self.folder / "logs", ignore_errors=True)
        resume = f"--resume {self.last.parent.parent} " if self.last else ""
        return start(resume + OPTIONS.format(shards=self.shards), self.folder, self.output, self.losses)

    def finish(self) -> None:
        """Run to the end.

        Raises:
            UserError: the run failed.
        """
        process = self.start()
        process.join()
        if process.exitcode:
            raise UserError(f"{self.output}: the run failed\n{self.last_line()}")

    def last_line(self) -> str:
        """Return the last line of the run's output."""
        return self.output.read_text(errors="replace").strip().splitlines()[-1]

    def steps(self) -> int:
        """Return the number of finished optimizer steps, as the logged losses show it."""
        return max((step for step, _ in read_losses(self.losses)), default=0)

    def lost_steps(self) -> int:
        """Return the number of finished steps that a resumed run has to repeat."""
        return max(0, self.steps() - self.saved_steps())

    def saved_steps(self) -> int:
        """Return the step of last.ckpt, which must be whole; 0 without a checkpoint."""
        if self.last is None:
            return 0
        return load_checkpoint(self.last)["global_step"]

    def wait_for(self, process: BaseProcess, step: int) -> None:
        """Wait until the run is past `step`."""
        while self.steps() <= step and process.is_alive():
            time.sleep(0.005)


def differences(run: DrilledRun, straight: DrilledRun) -> list[str]:
    """Return the names of losses and checkpoint entries in which `run` differs from `straight` by any bit."""
    losses, expected = read_losses(run.losses), read_losses(straight.losses)
    found = [f"loss of step {step}, batch {batch}" for step, batch in expected
             if losses.get((step, batch)) != expected[step, batch]]  # fmt: skip
    one, other = load_checkpoint(run.last), load_checkpoint(straight.last)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch")
    return found + [name for name in names if not _equal(one[name], other[name])]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def write_shards(folder: Path) -> None:
    """Write three shards of twenty-four training samples in all, and one prior shard of five samples."""
    generator = np.random.default_rng(0)

    def encoded(*shape: int) -> bytes:
        return npy.encode(generator.standard_normal(shape).astype(np.float16))

    for pattern, samples in (("train-%06d.tar", 24), ("prior.tar", 5)):
        with ShardWriter(str(folder / pattern), 8) as writer:
            for index in range(samples):
                writer.write(f"{index:06d}", {"f8.npy": encoded(32, 8, 8), "t5.npy": encoded(77, 8), "txt": b"noise"})
    (folder / "null.t5.npy").write_bytes(encoded(77, 8))


def drill_kills(folder: Path, shards: Path, straight: DrilledRun, kills: int, seconds: float, seed: int) -> int:
    """Kill runs within `seconds` of their start, `kills` times in all, and return the number of differing runs.

    A kill that costs more steps than lie between two checkpoints adds one.
    """
    chance = random.Random(seed)
    done = writing = most = wrong = runs = 0
    while done < kills:
        killed = DrilledRun(folder / f"killed-{runs}", shards)
        runs += 1
        while done < kills:
            process = killed.start()
            process.join(chance.uniform(0, seconds))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            done += 1
            lost = killed.lost_steps()
            most = max(most, lost)
            half_written = list(killed.folder.glob("logs/*/checkpoints/.last.*"))
            writing += bool(half_written)
            log.info("kill %d: at step %d%s; steps lost: %d", done, killed.steps(),
                     ", during a write of last.ckpt" if half_written else "", lost)  # fmt: skip
        if not killed.last or killed.saved_steps() < STEPS:
            killed.finish()
        wrong += report(f"run {runs}, resumed to its end", killed, straight)
    log.info("%d kills in %d runs, %d of them during a write of last.ckpt; steps lost: at most %d, "
             "steps between checkpoints: %d", done, runs, writing, most, EVERY)  # fmt: skip
    return wrong + (most > EVERY)


def drill_full_disk(folder: Path, shards: Path, straight: DrilledRun) -> int:
    """Fill the disk with one and a half checkpoints, resume with more room, and return 1 if the run differs."""
    size = straight.last.stat().st_size * 3 // 2
    try:
        with _tmpfs(folder / "disk", size) as disk:
            full = DrilledRun(disk, shards)
            full.output, full.losses = folder / "full-disk-output", folder / "full-disk-losses"
            process = full.start()
            process.join()
            log.info("full disk: exit code %d (%s); steps lost: %d",
                     process.exitcode, full.last_line(), full.lost_steps())  # fmt: skip
            subprocess.run(["mount", "-o", f"remount,size={100 * size}", disk], check=True)
            full.finish()
            return report("full disk, resumed with more room", full, straight)
    except PermissionError:
        log.info("full disk: skipped, because only root can mount a tmpfs")
        return 0


@contextmanager
def _tmpfs(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "drill", folder], capture_output=True).returncode:
        raise PermissionError
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def drill_cut_shard(folder: Path, shards: Path, straight: DrilledRun) -> int:
    """Truncate a training shard during training, restore it, resume, and return 1 if the run differs."""
    own = folder / "cut-shards"
    shutil.copytree(shards, own)
    cut = DrilledRun(folder / "cut-shard", own)
    process = cut.start()
    cut.wait_for(process, STEPS // 3)
    shard = own / "train-000001.tar"
    whole = shard.read_bytes()
    with shard.open("r+b") as file:
        file.truncate(len(whole) // 2)
    process.join()
    log.info("truncated shard: exit code %d (%s); steps lost: %d",
             process.exitcode, cut.last_line(), cut.lost_steps())  # fmt: skip
    shard.write_bytes(whole)
    cut.finish()
    return report("truncated shard, restored and resumed", cut, straight)


def drill_killed_worker(folder: Path, shards: Path, straight: DrilledRun) -> int:
    """Kill a data worker, as the kernel does when memory runs out, resume, and return 1 if the run differs."""
    robbed = DrilledRun(folder / "killed-worker", shards)
    process = robbed.start()
    robbed.wait_for(process, STEPS // 3)
    psutil.Process(process.pid).children()[0].kill()
    process.join()
    log.info("data worker killed: exit code %d (%s); steps lost: %d",
             process.exitcode, robbed.last_line(), robbed.lost_steps())  # fmt: skip
    if process.exitcode:
        robbed.finish()
    return report("data worker killed, resumed", robbed, straight)


def report(drill: str, run: DrilledRun, straight: DrilledRun) -> int:
    """Log the differences between `run` and `straight`; return 1 if there are any, else 0."""
    found = differences(run, straight)
    log.info("%s: %s", drill, f"DIFFERS in {', '.join(found)}" if found else "bit for bit equal to the undisturbed run")
    return bool(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the runs; must not exist")
    parser.add_argument("--kills", type=int, default=50, help="number of SIGKILLs at random moments (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    options = parser.parse_args()
    if options.folder.exists():
        raise UserError(f"--folder {options.folder}: exists already; give a new folder")
    folder = options.folder.resolve()
    shards = folder / "shards"
    write_shards(shards)
    straight = DrilledRun(folder / "straight", shards)
    straight.finish()
    began = time.monotonic()
    again = DrilledRun(folder / "again", shards)  # timed: here the fork server has imported all modules
    again.finish()
    seconds = time.monotonic() - began
    wrong = report(f"undisturbed run, repeated in {seconds:.1f} s", again, straight)
    wrong += drill_kills(folder, shards, straight, options.kills, seconds, options.seed)
    wrong += drill_full_disk(folder, shards, straight)
    wrong += drill_cut_shard(folder, shards, straight)
    wrong += drill_killed_worker(folder, shards, straight)
    if wrong:
        raise UserError(f"{wrong} drills found differences; see the log above")


if __name__ == "__main__":
    run(main)
