"""Writing of checkpoints: tolerance of a full disk, order of modification times, and numbered copies."""

from __future__ import annotations

import errno
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

# Fraction of the training time, and seconds, of writing above which there is a warning.
_SHARE, _SECONDS = 0.05, 60


class WritingTime:
    """Time that a run spends on writing checkpoints; warns once if it is a large part of the training time."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._has_warned = False
        self.training_begins()

    def training_begins(self) -> None:
        self._began = time.monotonic()

    def add(self, since: float) -> None:
        """Add the time from `since`, a value of `time.monotonic`, until now."""
        now = time.monotonic()
        self._seconds += now - since
        share = self._seconds / max(now - self._began, 1e-9)
        if self._seconds >= _SECONDS and share > _SHARE and not self._has_warned:
            self._has_warned = True
            log.warning(
                "\nWriting checkpoints has taken %.0f %% of the training time; write fewer: last.ckpt by "
                "lightning.modelcheckpoint.params.every_n_train_steps, the best by --check_val_every_n_epoch",
                100 * share,
            )  # fmt: skip


def try_save(trainer: Trainer, save: Callable[[], None], *, needed: bool = False) -> bool:
    """Call `save` in each process, and return in all of them True if the checkpoint was written.

    The previous checkpoint stays intact. A full disk gives a warning, because there may be room for the next
    checkpoint.

    Raises:
        OSError, UserError: the checkpoint was not written, although it is `needed`, such as at the end of training.
    """
    failure: OSError | None = None
    try:
        save()
    except OSError as error:
        failure = error
        trainer.strategy.barrier("Trainer.save_checkpoint")  # the processes that write nothing wait here
    written = failure is None
    if trainer.world_size > 1:
        written = trainer.strategy.reduce_boolean_decision(written)
    if written:
        return True
    if needed:
        raise failure or UserError("the first process could not write the last checkpoint")
    if failure:
        warn_not_saved(trainer.global_step, failure)
    return False


def warn_not_saved(step: int, failure: OSError) -> None:
    is_full = failure.errno in (errno.ENOSPC, errno.EDQUOT)
    log.warning(
        "\nNo checkpoint at step %d: %s%s; training continues; %s",
        step,
        f"{failure.filename}: " if failure.filename else "",
        failure.strerror or failure,
        "free disk space for the next checkpoint" if is_full else "mend this before the next checkpoint",
    )


def mark_newest(path: Path) -> None:
    """Make the modification time of the checkpoint at `path` the latest in its folder and among the runs in `logs`.

    Without this, the order would be wrong after the clock was set back.
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
    except OSError as error:  # the checkpoint itself is written
        log.debug("%s: its time was not set (%s)", path, error)


def keep_numbered(path: Path, step: int, count: int) -> None:
    """Keep the checkpoint at `path` also as `step=<step>.ckpt`, and remove all but the newest `count` such files.

    The file is a hard link, which takes no disk space until `path` is replaced. File systems without hard links get a
    copy.
    """
    with atomic_write(path.with_name(f"step={step:09}.ckpt")) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)  # with its time, which tells the newest
    numbered = sorted(path.parent.glob("step=*.ckpt"), key=lambda kept: kept.stat().st_mtime)
    for old in numbered[:-count]:
        old.unlink()
