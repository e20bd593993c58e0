from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm.release.initial_checkpoint import checkpoint_at_start
from ldm.training.structure import check_structure
from ldm.util import UserError

NAN = torch.tensor([math.nan])
MOMENTS = {"step": torch.tensor(1.0), "exp_avg": torch.ones(1)}


def content(**changes: Any) -> dict[str, Any]:
    """Return a checkpoint with one weight and its moments, and `changes`."""
    optimizer = {"state": {0: MOMENTS}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return {**checkpoint_at_start({}), "state_dict": {"a": torch.ones(1)}, "optimizer_states": [optimizer], **changes}


def test_check_structure_takes_a_checkpoint_whose_schedule_is_not_finite() -> None:
    check_structure(content())
    check_structure(content(state_dict={"a": torch.ones(1), "betas": NAN}))  # the config's schedule replaces it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pytorch-lightning_version": "2.0\n\x1b[31m"}, "pytorch-lightning_version: not a version"),
        ({"pytorch-lightning_version": "2.0zzz"}, "pytorch-lightning_version: not a version"),
        ({"state_dict": {"a": torch.ones(1), "scale_factor": NAN}}, "state_dict.scale_factor: has values that"),
        ({"state_dict": {"a": torch.full((1,), 1e300, dtype=torch.float64)}}, "state_dict.a: has values that"),
        ({"timestep_distribution": {"losses": NAN, "counts": torch.ones(1)}}, "timestep_distribution.losses: has"),
        ({"MixedPrecision": {"scale": math.inf}}, "MixedPrecision.scale: has values that are not finite"),
    ],
)
def test_check_structure_refuses_parts_that_a_run_takes_up(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_structure(content(**changes))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64])
def test_check_structure_refuses_moments_that_no_optimizer_can_hold(dtype: torch.dtype) -> None:
    moments = {**MOMENTS, "exp_avg": torch.tensor([1e300], dtype=torch.float64).to(dtype)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    with pytest.raises(UserError, match=r"optimizer_states\[0\]\.state\.0"):
        check_structure(content(optimizer_states=[optimizer]))
