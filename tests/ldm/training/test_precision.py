"""Tests of weights in bfloat16, and of clipping with a loss scale."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.utilities import GradClipAlgorithmType

from ldm.training.precision import Bfloat16Weights, ClippedMixedPrecision


def test_only_weights_become_bfloat16() -> None:
    precision = Bfloat16Weights()
    assert precision.convert_module(torch.nn.Linear(2, 2)).weight.dtype == torch.bfloat16
    batch = {"f8": torch.zeros(1, dtype=torch.float16)}
    assert precision.convert_input(batch)["f8"].dtype == torch.float16
    with precision.train_step_context():
        assert torch.get_default_dtype() == torch.float32
        assert torch.arange(2).div(3).dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", GradClipAlgorithmType)
@pytest.mark.parametrize("overflows", [False, True])
def test_scaled_gradients_are_clipped_to_the_limit_of_unscaled_ones(fused, algorithm, overflows) -> None:
    """SGD at rate 1 moves by the gradient itself. An overflow skips the step."""
    precision = ClippedMixedPrecision("16-mixed", "cpu")
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    loss = (weight * torch.tensor([3.0, torch.inf if overflows else 4.0])).sum()
    precision.scaler.scale(loss).backward()
    if not fused:
        precision.scaler.unscale_(optimizer)
    precision.clip_gradients(optimizer, 1.0, algorithm)
    precision.scaler.step(optimizer)
    by_value = algorithm == GradClipAlgorithmType.VALUE
    expected = [0.0, 0.0] if overflows else [-1.0, -1.0] if by_value else [-0.6, -0.8]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)
