"""Callback that logs memory and time per epoch."""

from __future__ import annotations

import logging
import resource
import sys
import time

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a CUDA `device`, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_SECONDS_BETWEEN_LINES = 60  # short epochs would fill the terminal


class CUDACallback(Callback):
    """Callback that logs peak memory and mean step time per epoch. Without CUDA, the memory is that of the process."""

    def __init__(self) -> None:
        self._began = 0.0
        self._first_step = 0
        self._logged_at = float("-inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # Lightning does not call it if a run resumes within an epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        self._began = time.perf_counter()
        self._first_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds = now - self._began
        steps = max(trainer.global_step - self._first_step, 1)
        peak = peak_memory(device) / 2**30
        pl_module.log_dict({"device/peak_memory_gib": peak, "device/step_seconds": seconds / steps})
        if trainer.is_global_zero and now - self._logged_at >= _SECONDS_BETWEEN_LINES:
            self._logged_at = now
            kind = "device memory" if device.type == "cuda" else "process memory"
            log.info("\nEpoch %d: %.1f s, %.3f s per step, peak %s %.2f GiB",
                     trainer.current_epoch, seconds, seconds / steps, kind, peak)  # fmt: skip
