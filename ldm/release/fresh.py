"""A training checkpoint made from a config, without a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.release.building import without_initialisation
from ldm.release.graft import Graft


def fresh_checkpoint(grafted: Graft) -> dict[str, Any]:
    """A Lightning checkpoint at step 0 that holds the grafted weights alone.

    It names no optimizer and no scheduler: a resume then makes them from its config, with the learning rate that
    `--scale_lr` and the number of devices give.
    """
    return checkpoint_at_start(grafted.state_dict)


def checkpoint_at_start(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Lightning checkpoint at step 0 that holds `weights` alone."""
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
    """The progress of a trainer that has not begun, as Lightning saves it."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logging.disable(logging.INFO)  # its report of the hardware is beside the point
    try:
        trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, **quiet)
    finally:
        logging.disable(logging.NOTSET)
    names = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
    return {name: getattr(trainer, name).state_dict() for name in names}


def state_dict_without_weights(build: Callable[[], torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The state dict of the module that `build` makes: weights on the meta device, buffers with their values."""
    with without_initialisation(on_meta=True):
        return build().state_dict()
