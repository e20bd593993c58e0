"""`main.py` in processes that begin with everything imported, and so in a second or two: to be killed at will."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = (
    "main",
    "tensorboard.summary.writer.event_file_writer",
    "pytorch_lightning.loggers",
    "ldm.callbacks.image_logger",
    "ldm.data.datamodule",
    "ldm.models.autoencoder",
    "ldm.models.diffusion.ddpm",
    "ldm.modules.diffusionmodules.openaimodel",
    "ldm.modules.encoders.modules",
    "ldm.training.fit",
    "ldm.training.trainer",
    "torch.optim",
)


def start(
    line: str, folder: Path, output: Path, losses: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start `python main.py` with the words of `line` in `folder`, with one thread.

    What it says is appended to `output`; to `losses`, each training loss as it is computed, for `read_losses`.
    """
    _CONTEXT.set_forkserver_preload(list(_PRELOADED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # the server, which the first process starts, imports by it
    try:
        process = _CONTEXT.Process(target=_main, args=(line.split(), folder, output, losses, dict(environment or {})))
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def read_losses(path: Path) -> dict[tuple[int, int], set[str]]:
    """The losses that the starts of a run computed, in hexadecimal, by optimizer step and batch of the epoch."""
    losses: dict[tuple[int, int], set[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        step, batch, loss = line.split()
        losses.setdefault((int(step), int(batch)), set()).add(loss)
    return losses


def _main(words: list[str], folder: Path, output: Path, losses: Path, environment: Mapping[str, str]) -> None:
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process started from a terminal
    os.chdir(folder)
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.update(environment)
    sys.argv = ["main.py", *words]

    import torch

    import main
    from ldm.cli.run import run

    torch.set_num_threads(1)
    with losses.open("ab", buffering=0) as file:
        _note_losses(file)
        run(main.main)


def _note_losses(file: BinaryIO) -> None:
    """Note losses at once: loggers gather lines, which a kill loses."""
    from ldm.models.diffusion.ddpm import LatentDiffusion

    plain = LatentDiffusion.training_step

    def training_step(self: LatentDiffusion, batch: Any, batch_idx: int) -> Any:
        loss = plain(self, batch, batch_idx)
        file.write(f"{self.global_step} {batch_idx} {loss.item().hex()}\n".encode())
        return loss

    LatentDiffusion.training_step = training_step
