"""Memory of a training step of which a test gives the peak alone."""

from __future__ import annotations

from dataclasses import dataclass


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
