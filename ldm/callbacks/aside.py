"""Looking at a model in the middle of its training without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ldm.callbacks.rng import preserved_rng


@contextmanager
def aside(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode without gradients; then the modes and all random states are again as before."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), preserved_rng():
            yield
    finally:
        for part in training:
            part.training = True
