"""Tests of the ranks read from the environment."""

from __future__ import annotations

import pytest

from ldm.distributed.ranks import Ranks
from ldm.util import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_NAME": "encode",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in {*TORCHRUN, *SRUN}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, Ranks(0, 1, 0, 1)),
        (TORCHRUN, Ranks(5, 8, 1, 4)),
        (SRUN, Ranks(4, 6, 0, 2)),
        (SRUN | TORCHRUN, Ranks(5, 8, 1, 4)),  # torchrun, started by srun
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, Ranks(0, 1, 0, 1)),  # typed in a shell that srun started
    ],
)
def test_ranks_are_read_from_the_environment(monkeypatch, environment, ranks):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == ranks


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK=8 .*below WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "x"}, "RANK=x in the environment"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID=x in the environment"),
    ],
)
def test_invalid_ranks_are_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        Ranks.from_environment()


def test_share_splits_evenly():
    assert [list(Ranks(rank, 3).share(range(8))) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
