"""Paths that the commands assume where none is given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ldm.util import UserError

# Where the 2022 tutorials put the released weights, and where runs put theirs.
CONVENTIONAL_RELEASE = Path("models/ldm/stable-diffusion-v1/model.ckpt")
LOGS = Path("logs")


def newest_checkpoint(logs: Path = LOGS, *, required: bool = True) -> Path | None:
    """Return the `last.ckpt` written last among the runs below `logs`, at any depth and behind symbolic links.

    `ldm.callbacks.saving.mark_newest` keeps their times in the order in which they were written, whatever the clock. Of
    files written at the same time, take that of the run that started last: names of runs begin with their start.

    Raises:
        UserError: there is none, and one is `required`.
    """
    found = [path for folder in _run_folders(logs) if (path := folder / "checkpoints" / "last.ckpt").is_file()]
    if not found and not required:
        return None
    if not found:
        raise UserError(f"no run with checkpoints/last.ckpt in {logs}/; name the training checkpoint with --train-ckpt")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.relative_to(logs).parts))


def _run_folders(logs: Path) -> Iterator[Path]:
    """Yield each folder below `logs` that has a folder `checkpoints`; a folder behind several links is looked at once.

    A run named `a/b` lies one level deeper than others.
    """
    seen = set()
    for folder, inside, _ in os.walk(logs, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        if "checkpoints" in inside:
            inside.remove("checkpoints")
            yield Path(folder)
