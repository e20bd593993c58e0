"""Test of the bytes that optimizers keep, against counts by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.optimizer_memory import bytes_per_parameter

SHAPES = {torch.Size([4]): 2, torch.Size([6, 4]): 3}  # 80 parameters
STEP = 4 * 5  # bytes of the counts of steps, one per parameter


@pytest.mark.parametrize(
    ("target", "held"),
    [
        ("torch.optim.AdamW", 2 * 80 * 4 + STEP),
        ("torch.optim.Adafactor", (2 * 4 + 3 * (6 + 4)) * 4 + STEP),
        ("pytorch_optimizer.Lion", 80 * 4),
        ("pytorch_optimizer.CAME", (80 + 2 * 4 + 3 * 2 * (6 + 4)) * 4 + STEP),  # the count is the norm of the weights
        ("pytorch_optimizer.Prodigy", 4 * 80 * 4),
    ],
)
def test_bytes_per_parameter_are_those_counted_by_hand(target: str, held: int) -> None:
    assert bytes_per_parameter(target, SHAPES) == held / 80
