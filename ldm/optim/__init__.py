"""Optimizers from configs, optimizer steps inside backward, and low-bit optimizers."""

from ldm.optim.building import build_optimizer
from ldm.optim.in_backward import InBackward
from ldm.optim.schedules import build_schedule

__all__ = ["InBackward", "build_optimizer", "build_schedule"]
