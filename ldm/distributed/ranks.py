"""Rank of this process under torchrun or Slurm, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ldm.util import refuse_if

T = TypeVar("T")

# Environment variables of torchrun, and their defaults.
_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}


def is_srun_task() -> bool:
    """Return True if `srun` started this process, except as an interactive shell."""
    return "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


@dataclass(frozen=True)
class Ranks:
    """Rank of this process among `world`, and its rank `local` among `local_world` on its machine, counted from 0."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or else the variables of `srun`.

        Without any of these, the process is the only one.

        Raises:
            UserError: a value is not a number, or the rank is not below the number of processes.
        """
        if "LOCAL_WORLD_SIZE" not in os.environ and is_srun_task():
            world = _number("SLURM_STEP_NUM_TASKS", 1)
            machines = max(_number("SLURM_STEP_NUM_NODES", 1), 1)
            return cls(_number("SLURM_PROCID", 0), world, _number("SLURM_LOCALID", 0), max(world // machines, 1))
        ranks = cls(*(_number(name, default) for name, default in _TORCHRUN.items()))
        refuse_if(
            ranks.rank >= ranks.world, f"RANK={ranks.rank} in the environment: must be below WORLD_SIZE={ranks.world}"
        )
        return ranks

    def share(self, everything: Sequence[T]) -> Sequence[T]:
        """Return every `world`-th entry of `everything`, starting at this rank."""
        return everything[self.rank :: self.world]


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    refuse_if(not text.isdecimal(), f"{name}={text} in the environment: give a whole number of at least 0")
    return int(text)


@dataclass(frozen=True)
class Launcher:
    """Launcher: its name, the variable of the rank, and the class of Lightning that reads its environment."""

    name: str
    rank: str
    environment: str


LAUNCHERS = {
    "torchrun": Launcher("torchrun", "RANK", "TorchElasticEnvironment"),
    "srun": Launcher("srun", "SLURM_PROCID", "SLURMEnvironment"),
}


def current_launcher() -> Launcher | None:
    """Return the launcher of this process, or None. `srun` can start `torchrun`, which then takes precedence."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return LAUNCHERS["torchrun"]
    return LAUNCHERS["srun"] if is_srun_task() else None


@dataclass(frozen=True)
class Launch:
    """Launcher, with the number of `processes` that it started on each of `machines`."""

    launcher: Launcher
    processes: int
    machines: int


def launched() -> Launch | None:
    """Return the launcher of this process, with its numbers of processes and machines; None if there is none."""
    launcher = current_launcher()
    if launcher is None:
        return None
    ranks = Ranks.from_environment()
    return Launch(launcher, ranks.local_world, ranks.world // ranks.local_world)


def is_first_process() -> bool:
    """Return True for the process that logs and writes for the whole run."""
    launcher = current_launcher()
    return os.environ.get(launcher.rank if launcher else "LOCAL_RANK", "0") == "0"
