"""Optimizers from configs, optimizer steps inside backward, and low-bit optimizers."""

from ldm.optim.building import build_optimizer, build_schedule
from ldm.optim.in_backward import InBackward

__all__ = ["InBackward", "build_optimizer", "build_schedule"]
