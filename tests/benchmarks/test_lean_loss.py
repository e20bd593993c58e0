"""Test that 8-bit moments and stochastically rounded bfloat16 weights reach the loss of AdamW in float32."""

from __future__ import annotations

import pytest

from benchmarks.lean_loss import VARIANTS, Task
from tests.training_runs import fixture_one_thread  # noqa: F401

BAND = 0.005  # of the loss; weights that are rounded to the nearest end 1.5 % above it
EXACT, LEAN, SMALLEST = "fp32, AdamW", "bf16, 8-bit AdamW, stochastic rounding", "the 8-bit one, weights streamed"


@pytest.mark.usefixtures("one_thread")
def test_lean_training_reaches_the_loss_of_adamw() -> None:
    task = Task(images=32, channel_mult=(1,))
    task.latents = task.latents[..., :4, :4].contiguous()  # a quarter of each image, which is a quarter of the work
    exact, lean, smallest = (task.trained_loss(*VARIANTS[name], steps=70, lr=2e-3) for name in (EXACT, LEAN, SMALLEST))
    assert exact < 0.6  # of 1 at the start
    assert lean == pytest.approx(exact, rel=BAND)
    assert smallest == pytest.approx(exact, rel=BAND)
