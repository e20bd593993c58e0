"""Which of several processes this one is, as torchrun and Slurm say in the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ldm.util import UserError

T = TypeVar("T")

# What torchrun says, and what holds where it says nothing.
_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}


def is_srun_task() -> bool:
    """Whether `srun` started this process, and not an interactive shell that it was typed in."""
    return "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`, the one numbered `local` of `local_world` on its machine; numbers count from 0."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say, or else Slurm's variables of an `srun`; a process
        alone where none are set.

        Raises:
            UserError: they are no numbers, or contradict each other.
        """
        if "LOCAL_WORLD_SIZE" not in os.environ and is_srun_task():
            world = _number("SLURM_STEP_NUM_TASKS", 1)
            machines = max(_number("SLURM_STEP_NUM_NODES", 1), 1)
            return cls(_number("SLURM_PROCID", 0), world, _number("SLURM_LOCALID", 0), max(world // machines, 1))
        ranks = cls(*(_number(name, default) for name, default in _TORCHRUN.items()))
        if ranks.rank >= ranks.world:
            raise UserError(f"RANK={ranks.rank} WORLD_SIZE={ranks.world} in the environment: ranks count from 0")
        return ranks

    def share(self, everything: Sequence[T]) -> Sequence[T]:
        """What of `everything` is this process's: each has every `world`-th."""
        return everything[self.rank :: self.world]


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment: is no number from 0")
    return int(text)


@dataclass(frozen=True)
class Launch:
    """What a launcher started: `processes` on each of `machines`."""

    launcher: str
    processes: int
    machines: int


def launched() -> Launch | None:
    """What started this process as one of several, by its environment; None if nothing did."""
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not is_torchrun and not is_srun_task():
        return None
    ranks = Ranks.from_environment()
    return Launch("torchrun" if is_torchrun else "srun", ranks.local_world, ranks.world // ranks.local_world)


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all."""
    names = {"torchrun": "RANK", "srun": "SLURM_PROCID"}
    launch = launched()
    return os.environ.get(names[launch.launcher] if launch else "LOCAL_RANK", "0") == "0"
