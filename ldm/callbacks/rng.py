"""Random numbers that do not depend on logged images, validation, workers or a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

# Separate streams, so that the random numbers of a dataset are not also the noise of a step.
_STEP, _DATA, _VALIDATION, _OPTIMIZER = range(4)


def seed_all(*words: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple of non-negative integers."""
    state = np.random.SeedSequence(words).generate_state(4, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(state[1:3].view(np.uint32))  # noqa: NPY002 - the global generator is what datasets use
    if _has_accelerator():
        torch.manual_seed(int(state[3]))
    else:  # it would note the call for devices that do not exist, three times with a formatted stack: 2 ms a step
        torch.default_generator.manual_seed(int(state[3]))


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (the CPU and the current CUDA device) on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class StepSeeds(Callback):
    """Callback that gives each training step its own random stream, seeded by seed, process, optimizer step and batch.

    A resumed run therefore samples the same numbers as an uninterrupted one, without any state to restore. Validation
    samples the same numbers each time, so that its losses are comparable. The checkpoint holds the seed for a resumed
    run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed(trainer, _DATA, trainer.fit_loop.batch_idx)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, _STEP, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Give all processes the same stream, because different stochastic rounding would make them diverge."""
        if trainer.world_size > 1:
            seed_all(self.seed, 0, _OPTIMIZER, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seed(trainer, _DATA, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_all(self.seed, trainer.global_rank, _VALIDATION)

    on_validation_end = on_train_start

    def _seed(self, trainer: Trainer, stream: int, batch_idx: int) -> None:
        seed_all(self.seed, trainer.global_rank, stream, trainer.global_step, max(batch_idx, 0))


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode without gradients, and restore its modes and all random states on exit."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), preserved_rng():
            yield
    finally:
        for part in training:
            part.training = True
