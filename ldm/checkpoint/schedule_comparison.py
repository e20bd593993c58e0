"""Comparison of the noise schedule in a file with that of the config, which takes precedence."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from ldm.checkpoint.keys import SCALE_FACTOR, SCHEDULE_KEYS
from ldm.checkpoint.mapped import in_memory

log = logging.getLogger(__name__)

_LEAST = 1e-5  # tolerance: relative rounding error of schedules computed in float32


def without_schedule(
    weights: Mapping[str, torch.Tensor], module: nn.Module, own: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """Return `weights` without those buffers of the noise schedule that are in `own`, the state dict of `module`.

    A schedule that differs by more than rounding gives a warning. `scale_factor` is kept for a model that measures it,
    because only the file has its value.
    """
    kept = (SCALE_FACTOR,) if getattr(module, "scale_by_std", False) else ()
    computed = [key for key in SCHEDULE_KEYS if key in weights and key in own and key not in kept]
    other = [key for key in computed if not _agree(weights[key], own[key])]
    if other:
        log.warning(
            "%s: the noise schedule (%s) differs from the config, whose schedule is used; "
            "check timesteps, linear_start and linear_end of the config",
            source,
            ", ".join(other[:3]) + (", …" if len(other) > 3 else ""),
        )
    return {key: value for key, value in weights.items() if key not in computed}


def _agree(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    """Return True if `theirs` equals `ours` up to the rounding of its dtype, relative to the largest finite value.

    At zero terminal SNR, the last values of some buffers are infinite.
    """
    if theirs.shape != ours.shape or not theirs.is_floating_point():
        return False
    found, expected = in_memory(theirs).double(), ours.detach().cpu().double()
    finite, rounding = expected.isfinite(), max(torch.finfo(theirs.dtype).eps, _LEAST)
    if not torch.equal(found[~finite], expected[~finite]):
        return False
    found, expected = found[finite], expected[finite]
    return bool(((found - expected).abs() <= rounding * expected.abs().max()).all())
