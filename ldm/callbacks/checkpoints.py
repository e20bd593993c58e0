"""Callback that writes `last.ckpt`."""

from __future__ import annotations

import copy
import logging
import signal
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from ldm.callbacks.background_writer import BackgroundWriter
from ldm.callbacks.faults import NumericalFault
from ldm.callbacks.saving import WritingTime, keep_numbered, mark_newest, try_save, warn_not_saved
from ldm.callbacks.signals import SignalRequests, TrainingStopped
from ldm.checkpoint import PickledCheckpoint
from ldm.distributed.collectives import FailedTogether
from ldm.modules.diffusionmodules.layers import StaysOnHost
from ldm.optim import InBackward
from ldm.util import UserError, check_choice, check_number

log = logging.getLogger(__name__)

# With several processes, agreement on a signal waits for the device, so it does not happen at every step. It happens
# every few seconds, because launchers kill a process half a minute after SIGTERM.
_STEPS_BETWEEN_AGREEMENTS, _SECONDS_BETWEEN_AGREEMENTS = 10, 3.0


class LastCheckpoint(Checkpoint):
    """Callback that writes `last.ckpt` at regular intervals, at the end of training, and on signals.

    It saves right after an optimizer step. Only there can a resumed run continue exactly, both within an epoch and at
    its end. A `UserError`, such as an unreadable image, also saves the state of the last step, except for a
    `NumericalFault` and an error that only one of several processes has. Training continues when the disk is full,
    except at its end or after a signal to stop.

    The first process writes the checkpoints at intervals in a thread, from a copy. Training waits for the others. While
    weights that stay on the host are copied, the next forward and backward pass run, and the next step waits.

    Args:
        path: path of `last.ckpt`.
        requests: requests that signals have made.
        every_n_train_steps: steps between checkpoints.
        train_time_interval: minutes between checkpoints. Without this and `every_n_train_steps`, each epoch ends with a
            checkpoint.
        save_last_k: number of the newest checkpoints that are also kept as `step=<step>.ckpt`.
        periodic: write at intervals and at the end. If False, only signals save.
        in_background: continue training while a checkpoint is written, if host memory has room for a copy.

    Raises:
        UserError: a value is not a number, or too small.
    """

    def __init__(
        self,
        path: Path,
        requests: SignalRequests,
        every_n_train_steps: int | None = None,
        train_time_interval: float | None = None,
        save_last_k: int = 0,
        periodic: bool = True,
        in_background: bool = True,
    ) -> None:
        where = "lightning.modelcheckpoint.params"
        check_number(f"{where}.every_n_train_steps", every_n_train_steps, least=1, optional=True)
        interval = f"{where}.train_time_interval"
        check_number(interval, train_time_interval, least=0, most=10**7, whole=False, optional=True, unit="minutes")
        check_number(f"{where}.save_last_k", save_last_k, least=0)
        check_choice(f"{where}.in_background", in_background, (True, False))
        self.path = path
        self.requests = requests
        self.every_n_train_steps = every_n_train_steps
        self.minutes = train_time_interval
        self.save_last_k = save_last_k
        self.periodic = periodic
        self.in_background = in_background
        self._background = BackgroundWriter()
        self._step = 0
        self._saved_step: int | None = None
        self._copies_later = False
        self._progress: dict[str, Any] = {}  # entries of the checkpoint that change between steps
        self._is_late = False
        self._stopping = False
        self.writing = WritingTime()
        self._last_tried = self._agreed_at = time.monotonic()
        self._next_agreement = self._agreed_step = 0  # steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._last_tried = self._agreed_at = time.monotonic()
        self.writing.training_begins()
        self._agreed_step = self._step
        self.requests.install()
        self.requests.training = True
        parts = () if pl_module is None else pl_module.modules()
        self._copies_later = any(isinstance(part, StaysOnHost) and part.stays_on_host for part in parts)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, InBackward):  # steps before `on_after_backward`
                optimizer.inner.register_step_pre_hook(lambda *_: self._wait_for_copy())
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch and loop.epoch_progress.current.ready == loop.epoch_progress.current.processed:
            # The checkpoint is of an epoch's last step. Lightning has ended that epoch, but assumes that the next has
            # begun. At the second such resume, its epoch count would be wrong by one.
            loop.reset_restart_stage()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are still accumulating, and a checkpoint cannot hold them
        self._step = trainer.global_step
        if not self._background.is_busy:
            self._finish_writing()
        self._progress = {"epoch": trainer.current_epoch, "loops": {"fit_loop": trainer.fit_loop.state_dict()}}
        self._progress = copy.deepcopy(self._progress)
        asked, timely, self._stopping = self._agreed(trainer)
        is_end = self.periodic and self._is_end(trainer)
        if asked or timely or self._stopping or is_end or (self.periodic and self._is_due(trainer)):
            self.requests.save = False
            self._save(trainer, announce=asked or self._stopping, needed=is_end or self._stopping)

    # Weights change in a step, and when validation puts the average in their place.

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wait_for_copy()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wait_for_copy()

    # Training stops at the next hook, because Lightning has logged the metrics of the step only then.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_if_asked()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked()
        self._wait_for_copy()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self.requests.stop and trainer.world_size == 1 and not trainer.sanity_checking:
            self._save(trainer, announce=True, needed=True)
            self._stopping = True
            self._stop_if_asked()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.requests.training = False
        # `_is_end` knows the last step of `max_steps` and `max_epochs`, but not that of `max_time` or early stopping.
        if self.periodic and self._progress:
            self._save_last_step(trainer, needed=True)
        self._finish_writing()
        self._stopping = self._agree(trainer, self.requests.stop is not None)
        self._stop_if_asked()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.requests.training = False
        if not isinstance(exception, SystemExit):  # a second signal, to quit at once
            self._finish_writing()
        if isinstance(exception, NumericalFault):
            return
        # Processes can only save together. Without a step since the start, there is nothing new.
        together = trainer.world_size == 1 or isinstance(exception, FailedTogether)
        if isinstance(exception, UserError) and together and self.periodic and self._progress:
            self._save_last_step(trainer, announce=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_late:
            checkpoint["epoch"] = self._progress["epoch"]
            checkpoint["loops"] |= self._progress["loops"]

    def _save_last_step(self, trainer: Trainer, announce: bool = False, needed: bool = False) -> None:
        """Save the state of the last step, after which other hooks and batches have come."""
        self._is_late = True
        self._save(trainer, announce, needed)
        self._is_late = False

    @staticmethod
    def _is_end(trainer: Trainer) -> bool:
        is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.global_step == trainer.max_steps or (trainer.is_last_batch and is_last_epoch)

    def _is_due(self, trainer: Trainer) -> bool:
        if self.every_n_train_steps:
            return trainer.global_step % self.every_n_train_steps == 0
        # An epoch of a few images takes seconds, and writing a large model takes longer, so minutes replace epochs.
        return self.minutes is None and trainer.is_last_batch

    def _agreed(self, trainer: Trainer) -> tuple[bool, bool, bool]:
        """Return, over all processes: is a save requested, is the time interval over, is a stop requested."""
        now = time.monotonic()
        timely = self.periodic and self.minutes is not None and now - self._last_tried >= 60 * self.minutes
        own = (self.requests.save, timely, self.requests.stop is not None)
        if trainer.world_size == 1:
            return own
        if trainer.global_step < self._next_agreement:
            return False, False, False
        steps = max(1, trainer.global_step - self._agreed_step)
        sent = torch.tensor([*own, (now - self._agreed_at) / steps], device=trainer.strategy.root_device)
        *agreed, seconds = trainer.strategy.reduce(sent, reduce_op="max").tolist()
        self._agreed_step, self._agreed_at = trainer.global_step, now
        steps_to_next = min(_STEPS_BETWEEN_AGREEMENTS, _SECONDS_BETWEEN_AGREEMENTS // max(seconds, 1e-3))
        self._next_agreement = trainer.global_step + max(1, int(steps_to_next))
        return tuple(map(bool, agreed))

    @staticmethod
    def _agree(trainer: Trainer, own: bool, by_all: bool = False) -> bool:
        """Return True if `own` is true in one of the processes, or in all of them."""
        return trainer.strategy.reduce_boolean_decision(own, all=by_all) if trainer.world_size > 1 else own

    def _save(self, trainer: Trainer, announce: bool, needed: bool = False) -> None:
        if trainer.fast_dev_run:
            return
        self._finish_writing()
        # The first process alone knows that its thread failed.
        saved = self._agree(trainer, self._saved_step == trainer.global_step, by_all=True)
        if not saved:
            began = time.monotonic()
            in_background = self.in_background and not (announce or needed)
            written = try_save(trainer, lambda: self._write(trainer, in_background), needed=needed)
            self._last_tried = time.monotonic()
            self.writing.add(since=began)
            if not written:
                return
            self._saved_step = trainer.global_step
        if announce:
            log.info("\nSaved step %d to %s", trainer.global_step, self.path)

    def _write(self, trainer: Trainer, in_background: bool) -> None:
        step = trainer.global_step

        def write(checkpoint: PickledCheckpoint) -> None:
            checkpoint.write(self.path)
            mark_newest(self.path)
            if self.save_last_k:
                keep_numbered(self.path, step, self.save_last_k)

        def start(checkpoint: PickledCheckpoint) -> None:
            self._background.start(checkpoint, write, self._copies_later)

        trainer.save_checkpoint(self.path, storage_options=start if in_background else write)

    def _wait_for_copy(self) -> None:
        began = time.monotonic()
        self._background.wait_for_copy()
        self.writing.add(since=began)

    def _finish_writing(self) -> None:
        """Wait for the checkpoint that is being written; warn if it could not be written.

        Raises:
            UserError: it could not be written for another reason than an error of the system.
        """
        began = time.monotonic()
        try:
            self._background.finish()
        except OSError as error:
            warn_not_saved(self._saved_step, error)
            self._saved_step = None
        except BaseException:
            self._saved_step = None
            raise
        self.writing.add(since=began)

    def _stop_if_asked(self) -> None:
        if self._stopping:
            # If this process received no signal, another one did.
            raise TrainingStopped(self.requests.stop or signal.SIGTERM, self._step)
