"""Comparison of the noise schedule in a file with the config's, which takes precedence."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from ldm.checkpoint.keys import SCALE_FACTOR, SCHEDULE_KEYS
from ldm.checkpoint.mapped import in_memory

log = logging.getLogger(__name__)

_LEAST = 1e-5  # relative difference of schedules that were computed in float32


def without_schedule(
    weights: Mapping[str, torch.Tensor], module: nn.Module, own: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """Return `weights` without the buffers of the noise schedule that `module`, whose state dict is `own`, has itself.

    A schedule that differs by more than the rounding of its dtype is named in a warning. A `scale_factor` stays where
    the model measures it: the file alone knows it then.
    """
    kept = (SCALE_FACTOR,) if getattr(module, "scale_by_std", False) else ()
    computed = [key for key in SCHEDULE_KEYS if key in weights and key in own and key not in kept]
    other = [key for key in computed if not _agree(weights[key], own[key])]
    if other:
        log.warning(
            "%s: its noise schedule (%s) differs from the config's, which is used; "
            "check timesteps, linear_start and linear_end of the config",
            source,
            ", ".join(other[:3]) + (", …" if len(other) > 3 else ""),
        )
    return {key: value for key, value in weights.items() if key not in computed}


def _agree(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    """Return whether `theirs` is `ours` as far as its dtype, whose rounding is relative to the largest value, tells."""
    if theirs.shape != ours.shape or not theirs.is_floating_point():
        return False
    found, expected = in_memory(theirs).double(), ours.detach().cpu().double()
    rounding = max(torch.finfo(theirs.dtype).eps, _LEAST)
    return bool(((found - expected).abs() <= rounding * expected.abs().max()).all())
