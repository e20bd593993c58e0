"""Child processes that run `main.py` from the fork server, and note their losses.

Such a process starts within a second or two, so a benchmark can kill and restart many of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks import fork_server

# Variables that a run leaves in its process.
_OF_OTHER_RUNS = ("LDM_RUN_FOLDER", "PL_GLOBAL_SEED")


def start(
    line: str, folder: Path, output: Path, losses: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start `python main.py` with the words of `line` in `folder`, on one thread.

    The process appends its messages to `output`, and each training loss to `losses` as soon as it is computed.
    `read_losses` reads that file. Its environment is that of the caller, with `environment`.
    """
    given = {name: value for name, value in os.environ.items() if name not in _OF_OTHER_RUNS} | dict(environment or {})
    return fork_server.start(_main, line.split(), losses, folder=folder, output=output, environment=given)


def read_losses(path: Path) -> dict[tuple[int, int], set[str]]:
    """Return all losses of a run and its restarts, in hexadecimal, by (optimizer step, batch of the epoch)."""
    losses: dict[tuple[int, int], set[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        step, batch, loss = line.split()
        losses.setdefault((int(step), int(batch)), set()).add(loss)
    return losses


def _main(words: list[str], losses: Path) -> None:
    import main
    from ldm.cli.run import run

    sys.argv = ["main.py", *words]
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
