"""Tests that a run killed at any moment resumes exactly."""

from __future__ import annotations

import random
import re
from pathlib import Path

import psutil
import pytest

from benchmarks.child_runs import read_losses
from benchmarks.fault_drill import STEPS, DrilledRun, differences, write_shards
from tests.waiting import join


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> DrilledRun:
    folder = tmp_path_factory.mktemp("straight")
    write_shards(folder / "shards")
    run = DrilledRun(folder / "run", folder / "shards")
    run.finish()
    return run


def test_kills_within_training_lose_the_steps_since_the_last_checkpoint(straight: DrilledRun, tmp_path: Path) -> None:
    """Two workers, accumulated batches, dropped captions, an EMA, prior shards: see the drill."""
    run, chance = DrilledRun(tmp_path, straight.shards), random.Random(5)
    for step in (4, 11, 17):  # in the first, second and third epoch of six steps
        process = run.start()
        run.wait_for(process, step)
        process.join(chance.uniform(0, 0.3))
        process.kill()
        join(process)
        assert process.exitcode == -9 and run.lost_steps() <= 2
    run.finish()
    assert differences(run, straight) == []
    assert len(read_losses(run.losses)) == 2 * STEPS


def test_a_kill_while_a_checkpoint_is_written_leaves_the_previous_one_intact(
    straight: DrilledRun, tmp_path: Path
) -> None:
    run = DrilledRun(tmp_path, straight.shards)
    for _ in range(20):
        process = run.start()
        while process.is_alive() and not (run.last and list(tmp_path.glob("logs/*/checkpoints/.last.*"))):
            pass
        process.kill()
        join(process)
        if list(tmp_path.glob("logs/*/checkpoints/.last.*")):  # else it was renamed just before the kill
            break
    assert process.exitcode == -9 and 0 < run.saved_steps() < STEPS
    run.finish()
    assert differences(run, straight) == []
    assert not list(tmp_path.glob("logs/*/checkpoints/.*")), "what the kill left is removed"


def test_a_killed_data_worker_ends_the_run_between_steps_and_loses_nothing(
    straight: DrilledRun, tmp_path: Path
) -> None:
    run = DrilledRun(tmp_path, straight.shards)
    process = run.start()
    run.wait_for(process, 7)
    psutil.Process(process.pid).children()[0].kill()
    assert join(process) == [1]
    assert re.fullmatch(
        r"error: DataLoader worker \(pid\(s\) \d+\) exited unexpectedly: probably killed .*", run.last_line()
    )
    assert run.lost_steps() == 0 and run.saved_steps() >= 8
    run.finish()
    assert differences(run, straight) == []
