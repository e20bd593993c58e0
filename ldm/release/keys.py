"""Training checkpoints and releases: how their keys are named, and checks that a file is the one or the other.

The names are those of `ldm.checkpoint.keys`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.keys import (
    COND_STAGE,
    CONDITIONER,
    EMA,
    EMA_COUNTERS,
    FIRST_STAGE,
    MODEL,
    OPTIONAL_KEYS,
    SCHEDULE_KEYS,
    UNET,
    ema_key,
    has_part,
    is_optional,
)
from ldm.util import UserError

log = logging.getLogger(__name__)

__all__ = [
    "CONDITIONER",
    "COND_STAGE",
    "EMA",
    "EMA_COUNTERS",
    "FIRST_STAGE",
    "LOOPS",
    "MODEL",
    "OPTIONAL_KEYS",
    "SCHEDULE_KEYS",
    "TRAINING_STATE",
    "UNET",
    "check_release",
    "check_training_checkpoint",
    "ema_key",
    "has_part",
    "has_step_counters",
    "is_optional",
]

# What a training checkpoint holds. Lightning 1.4 has no `loops`, which hold the counters that a resume goes on from.
TRAINING_STATE = ("state_dict", "global_step", "optimizer_states", "lr_schedulers")
LOOPS = "loops"


def check_release(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise `UserError` if `content`, read from `path`, is a training checkpoint.

    Optimizers are what pruning takes out: releases of 2022 still have the step, the callbacks and the loops.
    """
    if "optimizer_states" in content:
        raise UserError(
            f"{path}: a training checkpoint (it holds optimizer_states), not a release; give the released weights "
            "that training began from, such as sd-v1-4.ckpt, or make a release with tools/merge_release.py"
        )


def is_of_lightning_1(content: Mapping[str, Any]) -> bool:
    """Return whether the training checkpoint `content` has no progress of the loops, or that of Lightning 1."""
    return LOOPS not in content or str(content.get("pytorch-lightning_version")).startswith(("0.", "1."))


def check_training_checkpoint(content: Mapping[str, Any], path: str | Path, weights_alone: bool = False) -> None:
    """Raise `UserError` unless `content`, read from `path`, is what Lightning saves of a training.

    A checkpoint of Lightning 1.4 has no `loops` and is one too: see `has_step_counters`. With `weights_alone`, so is
    one that was saved without the optimizers' state.
    """
    missing = [key for key in TRAINING_STATE[: 2 if weights_alone else None] if key not in content]
    if missing:
        raise UserError(
            f"{path}: not a training checkpoint (it lacks {', '.join(missing)}); name a run's last.ckpt, "
            "make one from weights with tools/hack_weights.py, or start from them with model.params.ckpt_path"
        )
    if not isinstance(content["global_step"], int):
        raise UserError(f"{path}: not a training checkpoint (its global_step is no number)")
    optimizers = content.get("optimizer_states", [])
    if not (isinstance(optimizers, list) and all(isinstance(state, dict) for state in optimizers)):
        raise UserError(f"{path}: not a training checkpoint (its optimizer_states are no list of dicts)")


def has_step_counters(content: Mapping[str, Any], path: str | Path) -> bool:
    """Return whether the training checkpoint has the counters of Lightning 2; a log line says if not."""
    if not is_of_lightning_1(content):
        return True
    version = content.get("pytorch-lightning_version", "1")
    log.info("%s: of Lightning %s, whose progress is not read: its step counters start anew", path, version)
    return False
