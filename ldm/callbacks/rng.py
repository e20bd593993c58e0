"""Randomness that does not depend on what happened before: not on images, validation, workers, or a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

# One stream each, so that what a dataset draws for a step is not also the noise of that step.
_STEP, _DATA, _VALIDATION, _OPTIMIZER = range(4)


def seed_all(*words: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple of non-negative integers."""
    state = np.random.SeedSequence(words).generate_state(4, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(state[1:3].view(np.uint32))  # noqa: NPY002 - the global generator is what datasets use
    torch.manual_seed(int(state[3]))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the random state of Python, NumPy and torch (the CPU's and the current CUDA device's) as it was."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class StepSeeds(Callback):
    """Gives each training step a random stream of its own, named by seed, process, optimizer step and batch.

    A resumed run therefore draws what the uninterrupted one would have, with nothing to restore. Validation draws the
    same numbers each time, so that its losses compare. The checkpoint names the seed, for a resume to use.
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
        """All processes draw the same from here: where weights are rounded stochastically, they would drift apart."""
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
def aside(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode without gradients; then the modes and all random states are again as before."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), preserved_rng():
            yield
    finally:
        for part in training:
            part.training = True
