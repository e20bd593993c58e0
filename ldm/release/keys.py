"""Key names of checkpoints, from `ldm.checkpoint.keys`, and checks of training checkpoints and releases."""

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
from ldm.util import UserError, refuse_if

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

# Required keys of a training checkpoint. The step counters are in `loops`, which Lightning 1.4 does not write.
TRAINING_STATE = ("state_dict", "global_step", "optimizer_states", "lr_schedulers")
LOOPS = "loops"


def check_release(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise `UserError` if `content`, read from `path`, is a training checkpoint.

    The optimizer states distinguish the two. Releases of 2022 may hold the step, the callbacks and the loops.
    """
    refuse_if(
        "optimizer_states" in content,
        f"{path}: a training checkpoint (it holds optimizer_states), not a release; give the released weights "
        "that training began from, such as sd-v1-4.ckpt, or make a release with tools/merge_release.py",
    )


def check_training_checkpoint(content: Mapping[str, Any], path: str | Path, weights_alone: bool = False) -> None:
    """Raise `UserError` unless `content`, read from `path`, is a Lightning training checkpoint.

    It may lack `loops`, as checkpoints of Lightning 1.4 do; see `has_step_counters`. With `weights_alone`, it may also
    lack the state of optimizers and schedules.
    """
    missing = [key for key in TRAINING_STATE[: 2 if weights_alone else None] if key not in content]
    if missing:
        raise UserError(
            f"{path}: not a training checkpoint (it lacks {', '.join(missing)}); name a run's last.ckpt, "
            "make one from weights with tools/hack_weights.py, or start from them with model.params.ckpt_path"
        )
    refuse_if(
        not isinstance(content["global_step"], int),
        f"{path}: not a training checkpoint (its global_step is not an integer); name a run's last.ckpt",
    )
    optimizers = content.get("optimizer_states", [])
    refuse_if(
        not (isinstance(optimizers, list) and all(isinstance(state, dict) for state in optimizers)),
        f"{path}: not a training checkpoint (its optimizer_states are not a list of dicts); name a run's last.ckpt",
    )


def has_step_counters(content: Mapping[str, Any], path: str | Path) -> bool:
    """Return True if the training checkpoint has the step counters of Lightning 2. Log if it lacks them.

    One with `loops` and without a version is damaged, not old.
    """
    version = content.get("pytorch-lightning_version")
    if LOOPS in content and not str(version).startswith(("0.", "1.")):
        return True
    version = version or "1.4 or older"
    log.info("%s: of Lightning %s, without the loops of Lightning 2; the step counters start at 0", path, version)
    return False
