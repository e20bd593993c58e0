"""Tests of the launch read from the environment, and of the strategy for it."""

from __future__ import annotations

import pytest

from ldm.distributed.ranks import LAUNCHERS, Launch, is_first_process, launched
from ldm.training.strategies import check_launch, device_strategy
from ldm.util import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in {*TORCHRUN, *SRUN}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "launch", "is_first"),
    [
        ({}, None, True),
        ({"LOCAL_RANK": "1"}, None, False),  # started by Lightning
        (TORCHRUN, Launch(LAUNCHERS["torchrun"], 4, 2), False),
        (
            TORCHRUN | {"RANK": "4", "LOCAL_RANK": "0"},
            Launch(LAUNCHERS["torchrun"], 4, 2),
            False,
        ),  # first of its machine
        (TORCHRUN | {"RANK": "0"}, Launch(LAUNCHERS["torchrun"], 4, 2), True),
        (SRUN, Launch(LAUNCHERS["srun"], 4, 2), True),
        (SRUN | {"SLURM_PROCID": "3"}, Launch(LAUNCHERS["srun"], 4, 2), False),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, None, True),
        (SRUN | TORCHRUN, Launch(LAUNCHERS["torchrun"], 4, 2), False),  # torchrun, started by srun
    ],
)
def test_launched(monkeypatch, environment, launch, is_first):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == launch and is_first_process() == is_first


@pytest.mark.parametrize("devices", [4, "4", [0, 1, 2, 3], -1, "auto"])
def test_devices_that_fit(devices):
    check_launch({"devices": devices, "num_nodes": 2}, Launch(LAUNCHERS["torchrun"], 4, 2))


@pytest.mark.parametrize(("devices", "machines"), [(1, 2), ([0], 2), (4, 1), (8, 1)])
def test_devices_that_do_not_fit_are_refused(devices, machines):
    with pytest.raises(UserError, match=r"torchrun started 4 processes on each of 2 machines, but --devices .* ask"):
        check_launch({"devices": devices, "num_nodes": machines}, Launch(LAUNCHERS["torchrun"], 4, 2))


@pytest.mark.parametrize("given", [{}, {"strategy": "auto"}, {"strategy": "ddp"}])
def test_several_devices_do_not_broadcast_buffers(given):
    made = device_strategy({"devices": 2, **given})
    assert made._ddp_kwargs["broadcast_buffers"] is False
    assert not made._ddp_kwargs["find_unused_parameters"]


def test_one_device_on_each_of_two_machines_needs_a_strategy():
    assert device_strategy({"devices": 1}) == "auto"
    assert type(device_strategy({"devices": 1, "num_nodes": 2})).__name__ == "DDPStrategy"


def test_unused_parameters_are_found_if_the_config_asks_for_it():
    made = device_strategy({"devices": 2, "strategy": "ddp_find_unused_parameters_true"})
    assert made._ddp_kwargs["find_unused_parameters"]


def test_fsdp_is_sharded_strategy_for_several_devices_only():
    assert type(device_strategy({"devices": 2, "strategy": "fsdp"})).__name__ == "PartitionedStrategy"
    assert device_strategy({"devices": 1, "strategy": "fsdp"}) == "auto"  # as for a run that is resumed on one device
