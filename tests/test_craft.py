"""Runs of main.py with settings of the loss, the timesteps and the noise: resumed ones equal uninterrupted ones."""

from __future__ import annotations

import pytest

from tests.training_runs import (  # noqa: F401
    NOISE,
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
)

TIMESTEPS = "model.params.timestep_config.target=ldm.models.diffusion.timesteps."
LOSS = "model.params.loss_config.target=ldm.models.diffusion.loss."
LOSS_AWARE = f"{TIMESTEPS}LossAware " + " ".join(
    f"model.params.timestep_config.params.{setting}" for setting in ("bins=2", "history=1", "stratified=True")
)
MINIMAL = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"


@pytest.mark.parametrize(
    ("overlay", "options"),
    [
        ("", f"{LOSS_AWARE} {LOSS}Huber --accumulate_grad_batches 2"),
        ("lean.yaml", f"{LOSS_AWARE} {LOSS}SoftMinSNR {NOISE} data.params.batch_size=2"),
        ("", f"{NOISE} data.params.prior_urls=shards/s-000001.tar"),
        ("", f"{TIMESTEPS}CosMap model.params.timestep_config.params.stratified=True {LOSS}P2 {NOISE} {MINIMAL}"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path, overlay, options):
    line = f"-b tiny.yaml {overlay} {options}"
    train(f"-l straight --max_steps 4 {line}")
    train(f"-l resumed --max_steps 2 {line}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    train("-l plain --max_steps 4")
    assert logged(resumed, "train/loss") != logged(the_run(tmp_path / "plain"), "train/loss")
    if LOSS_AWARE in options:
        one, other = (
            state(tmp_path / run / "checkpoints/last.ckpt") for run in (the_run(tmp_path / "straight"), resumed)
        )
        assert one["timestep_distribution"]["counts"].sum() == (16 if "accumulate" in options else 8)
        assert one["timestep_distribution"]["losses"].equal(other["timestep_distribution"]["losses"])
