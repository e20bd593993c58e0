"""When checkpoints are written: `last.ckpt` always, others by a metric or a number of steps."""

from __future__ import annotations

import copy
import logging
import signal
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint

from ldm.callbacks.faults import NumericalFault
from ldm.callbacks.signals import SignalRequests, TrainingStopped
from ldm.util import UserError

log = logging.getLogger(__name__)

# With several processes, agreeing on a signal waits for the device, so it is not done at every step.
_STEPS_BETWEEN_AGREEMENTS = 10


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` every `every_n_train_steps`, or else after each epoch; at the end of training; on signals.

    It always saves right after an optimizer step: the one place in Lightning's loops from which a resumed run goes on
    exactly, in the middle of an epoch or at its end. Without `periodic` only signals save. A `UserError` (a picture
    that cannot be read) saves too, as of the last step, but for a `NumericalFault`.
    """

    def __init__(
        self, path: Path, requests: SignalRequests, every_n_train_steps: int | None = None, periodic: bool = True
    ) -> None:
        self.path = path
        self.requests = requests
        self.every_n_train_steps = every_n_train_steps
        self.periodic = periodic
        self._step = 0
        self._saved_step: int | None = None
        self._progress: dict[str, Any] = {}  # the checkpoint's entries that go on changing after a step
        self._is_late = False
        self._stopping = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self.requests.install()
        self.requests.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are still accumulating, and a checkpoint does not hold them
        self._step = trainer.global_step
        self._progress = {"epoch": trainer.current_epoch, "loops": {"fit_loop": trainer.fit_loop.state_dict()}}
        self._progress = copy.deepcopy(self._progress)
        save, self._stopping = self._agreed_requests(trainer)
        if save or self._stopping or (self.periodic and self._is_due(trainer)):
            self.requests.save = False
            self._save(trainer, announce=save or self._stopping)

    # It stops at the next hook, since only then has Lightning logged what the step measured.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_if_asked()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self.requests.stop and trainer.world_size == 1 and not trainer.sanity_checking:
            self._save(trainer, announce=True)
            self._stopping = True
            self._stop_if_asked()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.requests.training = False
        self._stopping = self._agree(trainer, self.requests.stop is not None)
        self._stop_if_asked()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.requests.training = False
        # Other processes are still training. And without a step of this start there is nothing new.
        if isinstance(exception, NumericalFault):
            return
        if isinstance(exception, UserError) and self.periodic and self._progress and trainer.world_size == 1:
            self._is_late = True
            self._save(trainer, announce=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_late:
            checkpoint["epoch"] = self._progress["epoch"]
            checkpoint["loops"] |= self._progress["loops"]

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if step == trainer.max_steps or (trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs):
            return True
        # An epoch of few pictures is over in seconds, and a checkpoint of a large model is not written in that time.
        return step % self.every_n_train_steps == 0 if self.every_n_train_steps else trainer.is_last_batch

    def _agreed_requests(self, trainer: Trainer) -> tuple[bool, bool]:
        """(save, stop): whether any process was asked to."""
        if trainer.world_size > 1 and trainer.global_step % _STEPS_BETWEEN_AGREEMENTS:
            return False, False
        return self._agree(trainer, self.requests.save), self._agree(trainer, self.requests.stop is not None)

    @staticmethod
    def _agree(trainer: Trainer, asked: bool) -> bool:
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def _save(self, trainer: Trainer, announce: bool) -> None:
        if trainer.fast_dev_run:
            return
        if self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step
        if announce:
            log.info("\nSaved step %d to %s", trainer.global_step, self.path)

    def _stop_if_asked(self) -> None:
        if self._stopping:
            raise TrainingStopped(self.requests.stop or signal.SIGTERM, self._step)  # or: another process was asked


class KeptCheckpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which complains once, not fatally, about a metric that is not logged.

    The recipe's monitor is a validation metric, and a first try often has no validation data.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self._complained = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Else the best of another run, which this one must not delete; nor any file that a checkpoint happens to name.
        if state_dict["dirpath"] == self.dirpath and self._are_own(state_dict):
            super().load_state_dict(state_dict)

    def _are_own(self, state: dict[str, Any]) -> bool:
        single = (state.get(key) for key in ("best_model_path", "kth_best_model_path", "last_model_path"))
        paths = [*(state.get("best_k_models") or {}), *filter(None, single)]
        return all(Path(path).parent == Path(self.dirpath) and Path(path).suffix == ".ckpt" for path in paths)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._can_rank(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self._can_rank(trainer):
            super().on_validation_end(trainer, pl_module)

    def _can_rank(self, trainer: Trainer) -> bool:
        if self.monitor is None or self.monitor in trainer.callback_metrics:
            return True
        # What is saved every so many steps waits for the first of them.
        if self.every_n_epochs and not self._complained:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            hint = "" if any(trainer.num_val_batches) else "; no validation data?"
            log.warning("No best checkpoints are kept: %r is not logged%s (logged: %s)", self.monitor, hint, logged)
            self._complained = True
        return False
