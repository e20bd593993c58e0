"""Optimizers that a config names, optimizer steps inside backward, and low-bit state that checkpoints can hold."""

from ldm.optim.building import QUANTISED, build_optimizer
from ldm.optim.in_backward import InBackward

__all__ = ["QUANTISED", "InBackward", "build_optimizer"]
