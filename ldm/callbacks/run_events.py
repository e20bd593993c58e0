"""Callback that records the starts of a run, and the release that it started from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.callbacks.progress import batch_size
from ldm.checkpoint.keys import RELEASE
from ldm.events import START, EventLog

_MOST_IN_NAME = 4096  # letters of a path


class RunEvents(Callback):
    """Callback that adds a `start` event with command, device and counts to `events`, and keeps its step current.

    It carries the note about the release, which `tools/hack_weights.py` leaves in a checkpoint, from one checkpoint to
    the next.
    """

    def __init__(self, events: EventLog, resume: Path | None, seed: int) -> None:
        self.events = events
        self.resume = resume
        self.seed = seed
        self._release: dict[str, str] | None = None
        self._begun = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._release = _release_in(checkpoint)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._release is not None:
            checkpoint[RELEASE] = self._release

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._begun or not trainer.is_global_zero:
            return
        self._begun = True
        self.events.step = trainer.global_step
        device = trainer.strategy.root_device
        self.events.add(
            START,
            command=sys.argv,
            resume=None if self.resume is None else str(self.resume),
            release=self._release,
            seed=self.seed,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            processes=trainer.world_size,
            images_per_step=batch_size(batch) * trainer.world_size * trainer.accumulate_grad_batches,
            trained=sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad),
            software=f"torch {torch.__version__}, pytorch-lightning {pytorch_lightning.__version__}",
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self.events.step = trainer.global_step
            self.events.flush()  # the configs are saved by now


def _release_in(checkpoint: dict[str, Any]) -> dict[str, str] | None:
    """Return the name and the SHA-256 of the release that is recorded in `checkpoint`, or None for anything else.

    The file may come from somebody else, and the record is copied into each further checkpoint and event.
    """
    note = checkpoint.get(RELEASE)
    parts = [note.get(key) for key in ("name", "sha256")] if isinstance(note, dict) else []
    if not parts or not all(isinstance(part, str) and len(part) <= _MOST_IN_NAME for part in parts):
        return None
    return dict(zip(("name", "sha256"), parts, strict=True))
