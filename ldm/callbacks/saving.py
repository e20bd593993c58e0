"""Around the writing of a checkpoint: a disk that is full, and the newest ones kept under names of their own."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pytorch_lightning import Trainer

from ldm.files import atomic_write
from ldm.util import UserError

log = logging.getLogger(__name__)

# What writing may take of the training time before it is said, and from how many seconds on.
_SHARE, _SECONDS = 0.05, 60


class WritingTime:
    """What the checkpoints of a run, of whatever kind, take of its training time; says once that it is much."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._is_said = False
        self.training_begins()

    def training_begins(self) -> None:
        self._began = time.monotonic()

    def add(self, since: float) -> None:
        """Count the time `since` a moment of `time.monotonic` until now as spent on writing."""
        now = time.monotonic()
        self._seconds += now - since
        share = self._seconds / max(now - self._began, 1e-9)
        if self._seconds >= _SECONDS and share > _SHARE and not self._is_said:
            self._is_said = True
            log.warning(
                "\nWriting checkpoints has taken %.0f %% of the training time; write fewer: last.ckpt by "
                "lightning.modelcheckpoint.params.every_n_train_steps, the best by --check_val_every_n_epoch",
                100 * share,
            )  # fmt: skip


def saved(trainer: Trainer, save: Callable[[], None], *, needed: bool = False) -> bool:
    """Call `save` in each process; whether the checkpoint was written, which is the same answer in each.

    What was there before is whole in any case. A full disk is a warning, since the next checkpoint may find room.

    Raises:
        OSError, UserError: it was not written, but is `needed`: training ends with it.
    """
    failure: OSError | None = None
    try:
        save()
    except OSError as error:
        failure = error
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the processes wait that write nothing
    written = failure is None
    if trainer.world_size > 1:
        written = trainer.strategy.reduce_boolean_decision(written)
    if written:
        return True
    if needed:
        raise failure or UserError("the first process could not write the last checkpoint")
    if failure:
        log.warning(
            "\nNo checkpoint at step %d: %s: %s; make room: training goes on, and writes the next when it is due",
            trainer.global_step, failure.filename, failure.strerror or failure,
        )  # fmt: skip
    return False


def mark_newest(path: Path) -> None:
    """Make the modification time of the checkpoint at `path` later than that of all others in its folder and logs.

    The clock may have been set back since those were written.
    """
    others = {*path.parent.glob("[!.]*.ckpt")}
    if path.parent.name == "checkpoints":
        others |= {*path.parent.parent.parent.glob("*/checkpoints/last.ckpt")}
    times = []
    for other in others - {path}:
        try:
            times.append(other.stat().st_mtime_ns)
        except OSError:  # removed in the meantime
            continue
    try:
        now = path.stat()
        if times and now.st_mtime_ns <= max(times):
            os.utime(path, ns=(now.st_atime_ns, max(times) + 1_000_000))
    except OSError as error:  # not worth a checkpoint
        log.debug("%s: its time was not set (%s)", path, error)


def keep_numbered(path: Path, step: int, count: int) -> None:
    """Keep the checkpoint at `path` as `step=<step>.ckpt` too, and of all with such names the `count` written last.

    It is a second name of the same file, which takes no room until `path` is replaced; a copy where the file system
    has no second names.
    """
    with atomic_write(path.with_name(f"step={step:09}.ckpt")) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
    numbered = sorted(path.parent.glob("step=*.ckpt"), key=lambda kept: kept.stat().st_mtime)
    for old in numbered[:-count]:
        old.unlink()
