"""Simulation of training steps of which a test gives the peaks alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class StepOfPeak:
    """Stand-in for `ldm.planning.step.StepMemory`. Without `extends`, its peak tells nothing of larger batches."""

    of: dict[str, int]
    extends: bool = True

    def peak(self) -> dict[str, int]:
        return self.of

    def extended(self, other: StepOfPeak, times: int) -> StepOfPeak | None:
        if not self.extends:
            return None
        return StepOfPeak({name: size + times * (other.of[name] - size) for name, size in self.of.items()})


@dataclass
class SimulationOfPeaks:
    """Stand-in for `ldm.planning.step.Simulation`: `step` returns what a step of a config takes, by images and size."""

    step: Callable[[Any, int, int | None], StepOfPeak]
    config: Any
    size: int | None

    def memory(self, images: int) -> StepOfPeak:
        return self.step(self.config, images, self.size)
