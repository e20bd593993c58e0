"""Training checkpoint at step 0, made without a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.release.initialisation import without_initialisation


def checkpoint_at_start(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Lightning checkpoint at step 0 that holds only `weights`.

    It has no state of optimizers and schedulers. A resumed run builds them from its config, with the learning rate that
    `--scale_lr` and the number of devices give.
    """
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": dict(weights),
        "loops": loops_at_start(),
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def loops_at_start() -> dict[str, Any]:
    """Return the progress of a trainer that has not started, in Lightning's layout."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logging.disable(logging.INFO)  # hides Lightning's report of the hardware
    try:
        trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, **quiet)
    finally:
        logging.disable(logging.NOTSET)
    names = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
    return {name: getattr(trainer, name).state_dict() for name in names}


def state_dict_without_weights(build: Callable[[], torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return the state dict of the module that `build` returns. Weights are on the meta device, buffers have values."""
    with without_initialisation(on_meta=True):
        return build().state_dict()
