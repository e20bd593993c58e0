"""Around the writing of a checkpoint: a disk that is full, and the newest ones kept under names of their own."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pytorch_lightning import Trainer

from ldm.files import atomic_write
from ldm.util import UserError

log = logging.getLogger(__name__)


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
