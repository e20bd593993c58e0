"""Paths that the commands assume where none is given."""

from __future__ import annotations

from pathlib import Path

from ldm.util import UserError

# Where the 2022 tutorials put the released weights, and where runs put theirs.
CONVENTIONAL_RELEASE = Path("models/ldm/stable-diffusion-v1/model.ckpt")
LOGS = Path("logs")


def newest_checkpoint(logs: Path = LOGS) -> Path:
    """Return the `last.ckpt` written last among the runs under `logs`, at any depth: a run may be named `a/b`.

    `ldm.callbacks.saving.mark_newest` keeps their times in the order in which they were written, whatever the clock.

    Raises:
        UserError: there is none.
    """
    found = sorted(logs.rglob("checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no {logs}/*/checkpoints/last.ckpt; name the training checkpoint with --train-ckpt")
    return found[-1]
