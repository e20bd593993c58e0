"""Child processes that run `main.py` from a fork server with all modules imported.

Such a process starts within a second or two, so a benchmark can kill and restart many of them.
"""

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
# Variables that a run leaves in its process. The fork server has them if a run came before it.
_OF_OTHER_RUNS = ("LDM_RUN_FOLDER", "PL_GLOBAL_SEED")
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
    """Start `python main.py` with the words of `line` in `folder`, on one thread.

    The process appends its messages to `output`, and each training loss to `losses` as soon as it is computed.
    `read_losses` reads that file.
    """
    _CONTEXT.set_forkserver_preload(list(_PRELOADED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # import path of the fork server, which the first process starts
    try:
        process = _CONTEXT.Process(target=_main, args=(line.split(), folder, output, losses, dict(environment or {})))
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def read_losses(path: Path) -> dict[tuple[int, int], set[str]]:
    """Return all losses of a run and its restarts, in hexadecimal, by (optimizer step, batch of the epoch)."""
    losses: dict[tuple[int, int], set[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        step, batch, loss = line.split()
        losses.setdefault((int(step), int(batch)), set()).add(loss)
    return losses


def _main(words: list[str], folder: Path, output: Path, losses: Path, environment: Mapping[str, str]) -> None:
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process that a user starts
    os.chdir(folder)
    for name in _OF_OTHER_RUNS:
        os.environ.pop(name, None)
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
    """Make training write each loss at once. Loggers buffer their lines, and a kill loses the buffer."""
    from ldm.models.diffusion.ddpm import LatentDiffusion

    plain = LatentDiffusion.training_step

    def training_step(self: LatentDiffusion, batch: Any, batch_idx: int) -> Any:
        loss = plain(self, batch, batch_idx)
        file.write(f"{self.global_step} {batch_idx} {loss.item().hex()}\n".encode())
        return loss

    LatentDiffusion.training_step = training_step
