"""Optimizers that configs name: built by one function, stepped inside backward, their state kept as plain data."""

from ldm.optim.building import build_optimizer
from ldm.optim.in_backward import InBackward

__all__ = ["InBackward", "build_optimizer"]
