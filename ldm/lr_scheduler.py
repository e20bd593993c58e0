"""Learning rate schedules: multipliers of the base learning rate for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ldm.util import refuse_if

# Classes of torch.optim.lr_scheduler whose rates follow from the step and from numbers alone.
TORCH_SCHEDULES = (
    *("ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR"),
    *("MultiStepLR", "OneCycleLR", "PolynomialLR", "StepLR"),
)


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from `lr_start` to `lr_max`, then half a cosine down to `lr_min` at `max_decay_steps`.

    `verbosity_interval` is accepted for old configs and ignored. The trainer logs the learning rate.

    Raises:
        UserError: the decay ends before the warm-up.
    """

    def __init__(
        self,
        warm_up_steps: float,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: float,
        verbosity_interval: int = 0,
    ) -> None:
        refuse_if(
            max_decay_steps <= warm_up_steps,
            f"max_decay_steps {max_decay_steps} must be greater than warm_up_steps {warm_up_steps}",
        )
        self.warm_up_steps = warm_up_steps
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_start = lr_start
        self.max_decay_steps = max_decay_steps

    def schedule(self, n: float) -> float:
        """Return the multiplier at step `n`, or after `n` epochs if the lengths are epochs."""
        if n < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) / self.warm_up_steps * n
        progress = min((n - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps), 1.0)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(progress * math.pi))

    __call__ = schedule


class LambdaWarmUpCosineScheduler2:
    """Cycles of a linear warm-up from `f_start` to `f_max` and half a cosine down to `f_min`.

    Each argument is a list with one entry per cycle. `cycle_lengths` includes the warm-up. After the last cycle, the
    multiplier stays at its end value. `verbosity_interval` is accepted for old configs and ignored.

    Raises:
        UserError: the lists differ in length or are empty, or a warm-up is as long as its cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[float],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[float],
        verbosity_interval: int = 0,
    ) -> None:
        lengths = [len(values) for values in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)]
        refuse_if(
            len(set(lengths)) != 1,
            f"warm_up_steps, f_min, f_max, f_start and cycle_lengths have {lengths} entries; "
            "give one entry per cycle to each",
        )
        refuse_if(not lengths[0], "cycle_lengths is empty; give one entry per cycle")
        refuse_if(
            any(a >= b for a, b in zip(warm_up_steps, cycle_lengths, strict=True)),
            f"warm_up_steps {warm_up_steps} must be less than cycle_lengths {cycle_lengths}, cycle by cycle",
        )
        self.warm_up_steps = warm_up_steps
        self.f_min = f_min
        self.f_max = f_max
        self.f_start = f_start
        self.cycle_lengths = cycle_lengths

    def schedule(self, n: float) -> float:
        """Return the multiplier at step `n`, or after `n` epochs if the lengths are epochs."""
        cycle, last = 0, len(self.cycle_lengths) - 1
        # A step on the boundary belongs to the cycle that ends there.
        while cycle < last and n > self.cycle_lengths[cycle]:
            n -= self.cycle_lengths[cycle]
            cycle += 1
        n = min(n, self.cycle_lengths[cycle])
        if n < self.warm_up_steps[cycle]:
            start, peak = self.f_start[cycle], self.f_max[cycle]
            return start + (peak - start) / self.warm_up_steps[cycle] * n
        return self._decay(n, cycle)

    def _decay(self, n: float, cycle: int) -> float:
        warm_up, length = self.warm_up_steps[cycle], self.cycle_lengths[cycle]
        progress = (n - warm_up) / (length - warm_up)
        low, high = self.f_min[cycle], self.f_max[cycle]
        return low + 0.5 * (high - low) * (1 + math.cos(progress * math.pi))

    __call__ = schedule


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Like `LambdaWarmUpCosineScheduler2`, with a straight line down to `f_min` in place of the cosine.

    The line starts at `f_max` at the start of the cycle, as in the original implementation. The multiplier therefore
    drops at the end of the warm-up: from 0.98 to 0.5 for `f_max` 1, `f_min` 0 and a warm-up of 50 of 100 steps.
    """

    def _decay(self, n: float, cycle: int) -> float:
        low, high = self.f_min[cycle], self.f_max[cycle]
        return low + (high - low) * (self.cycle_lengths[cycle] - n) / self.cycle_lengths[cycle]
