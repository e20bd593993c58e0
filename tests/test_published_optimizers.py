"""Runs of main.py with optimizers of other packages: a resumed run equals an uninterrupted one."""

from __future__ import annotations

import pytest

from tests.training_runs import (  # noqa: F401
    assert_equal,
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
)

OPTIMIZER = "model.params.optimizer_config."
INNER = f"{OPTIMIZER}target=ldm.optim.InBackward {OPTIMIZER}params.optimizer."
MINIMAL = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"


@pytest.mark.parametrize(
    "options",
    [
        f"{INNER}target=pytorch_optimizer.Lion",
        f"{INNER}target=pytorch_optimizer.CAME",
        f"{INNER}target=torch.optim.Adafactor",
        f"{OPTIMIZER}target=pytorch_optimizer.Prodigy {OPTIMIZER}params.lr=1.0",
        f"{OPTIMIZER}target=pytorch_optimizer.Prodigy {OPTIMIZER}params.lr=1.0 {MINIMAL}",
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path, options):
    line = f"-b tiny.yaml {options}"
    assert train(f"-l straight --max_steps 4 {line}") == 0
    assert train(f"-l resumed --max_steps 2 {line}") == 0
    resumed, straight = the_run(tmp_path / "resumed"), the_run(tmp_path / "straight")
    assert train(f"--resume {resumed} --max_steps 4") == 0
    assert_same_training(straight, resumed)
    groups, others = (
        state(run / "checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"] for run in (straight, resumed)
    )
    for group, other in zip(groups, others, strict=True):
        assert_equal(group, other)
    losses = [float(loss) for _, loss in sorted(logged(resumed, "train/loss").items())]
    assert len({*losses}) == 4
    if "Prodigy" in options:
        assert groups[0]["d"] > groups[0]["d0"]  # its estimate of the rate went on from the checkpoint
