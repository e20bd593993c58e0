"""Test that 8-bit moments and stochastically rounded bfloat16 weights reach the loss of AdamW in float32."""

from __future__ import annotations

import pytest

from benchmarks.lean_loss import VARIANTS, Task
from tests.training_runs import fixture_one_thread  # noqa: F401

BAND = 0.01  # of the loss; weights that are rounded to the nearest end 2 % above it
LEAN, SMALLEST = "bf16, 8-bit AdamW, stochastic rounding", "the 8-bit one, weights streamed"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "steps"), [(LEAN, 70), (SMALLEST, 200)])
def test_lean_training_reaches_the_loss_of_adamw(name: str, steps: int) -> None:
    task = Task(images=32, channel_mult=(1,))
    exact, lean = (task.trained_loss(*VARIANTS[variant], steps=steps, lr=1e-3) for variant in ("fp32, AdamW", name))
    assert exact < 0.6  # of 1 at the start
    assert lean == pytest.approx(exact, rel=BAND)
