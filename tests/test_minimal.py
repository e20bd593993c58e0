"""Tests of the minimal tier through main.py: streamed weights train like resident ones."""

from __future__ import annotations

import pytest

from ldm.util import UserError
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
)

STREAMED = (
    "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel "
    "model.params.unet_config.params.stream_dtype="
)


def test_training_and_resuming_equal_those_of_resident_weights(train, tmp_path):
    """Losses of each step, weights, averages and optimizer state: bit for bit, with accumulation and clipping."""
    options = "--accumulate_grad_batches 2 --gradient_clip_val 0.5"
    assert train(f"-l plain --max_steps 4 {options}") == 0
    assert train(f"-l streamed --max_steps 2 {options} {STREAMED}fp32") == 0
    run = the_run(tmp_path / "streamed")
    assert train(f"--resume {run} --max_steps 4") == 0
    assert_same_training(the_run(tmp_path / "plain"), run)


def test_bf16_streaming_writes_float32_checkpoints(train, tmp_path):
    assert train(f"-l bf16 --max_steps 3 {STREAMED}bf16") == 0
    run = the_run(tmp_path / "bf16")
    content = state(run / "checkpoints" / "last.ckpt")
    assert {str(value.dtype) for key, value in content["state_dict"].items() if key.startswith("model.")} == {
        "torch.float32"
    }
    assert len(logged(run, "train/loss")) == 3


def test_several_devices_are_refused(train):
    with pytest.raises(UserError, match="need one device"):
        train(f"--devices 2 --accelerator cpu --max_steps 1 {STREAMED}bf16")
