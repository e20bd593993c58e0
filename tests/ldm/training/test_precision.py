"""Test that `bf16-true` casts the weights to bfloat16, but not batches or the default dtype."""

from __future__ import annotations

import torch

from ldm.training.precision import Bfloat16Weights


def test_only_weights_become_bfloat16() -> None:
    precision = Bfloat16Weights()
    assert precision.convert_module(torch.nn.Linear(2, 2)).weight.dtype == torch.bfloat16
    batch = {"f8": torch.zeros(1, dtype=torch.float16)}
    assert precision.convert_input(batch)["f8"].dtype == torch.float16
    with precision.train_step_context():
        assert torch.get_default_dtype() == torch.float32
        assert torch.arange(2).div(3).dtype == torch.float32
