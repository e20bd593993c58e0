"""Choice of code paths that are faster on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_enabled = True


def is_on_cpu(x: Tensor) -> bool:
    """Return True if `x` is on a CPU and CPU code paths are enabled."""
    return _enabled and x.device.type == "cpu"


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Disable CPU code paths in this context, to predict the behaviour on a GPU."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
