"""Default paths of the commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ldm.release import CONVENTIONAL_RELEASE
from ldm.util import refuse_if

LOGS = Path("logs")  # folder of the runs


def newest_checkpoint(logs: Path = LOGS, *, required: bool = True) -> Path | None:
    """Return the newest `last.ckpt` of the runs below `logs`, at any depth and through symbolic links.

    `ldm.callbacks.saving.mark_newest` keeps the modification times in writing order, even if the clock is set back.
    Among files of equal time, the run that started last is taken; the name of a run begins with its start time.

    Raises:
        UserError: there is no such file, and one is `required`.
    """
    found = [path for folder in _run_folders(logs) if (path := folder / "checkpoints" / "last.ckpt").is_file()]
    if not found and not required:
        return None
    refuse_if(
        not found, f"no run with checkpoints/last.ckpt in {logs}/; name the training checkpoint with --train-ckpt"
    )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.relative_to(logs).parts))


def check_release(option: str, path: Path) -> None:
    """Raise `UserError` if `path` is the default of `option`, and missing."""
    refuse_if(
        path == CONVENTIONAL_RELEASE and not path.exists(),
        f"{path}: no such file; it is the default of {option}, so name your release with {option} FILE",
    )


def _run_folders(logs: Path) -> Iterator[Path]:
    """Yield each folder below `logs` that has a subfolder `checkpoints`; visit a folder with several links once.

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
