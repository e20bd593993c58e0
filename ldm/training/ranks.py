"""Which of several processes this one is, as torchrun and its like say in the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ldm.util import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`, the one numbered `local` of `local_world` on its machine; numbers count from 0."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE say; a process alone where they are not set.

        Raises:
            UserError: they are no numbers, or contradict each other.
        """
        values = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            text = os.environ.get(name, "1" if name.endswith("SIZE") else "0")
            if not text.isdecimal():
                raise UserError(f"{name}={text} in the environment: is no number from 0")
            values.append(int(text))
        ranks = cls(*values)
        if ranks.rank >= ranks.world:
            raise UserError(f"RANK={ranks.rank} WORLD_SIZE={ranks.world} in the environment: ranks count from 0")
        return ranks

    def share(self, everything: Sequence[T]) -> Sequence[T]:
        """What of `everything` is this process's: each has every `world`-th."""
        return everything[self.rank :: self.world]
