"""Where a CPU is faster another way than a GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_enabled = True


def is_on_cpu(x: Tensor) -> bool:
    """Whether `x` is on a CPU, so that what is faster there is to be done."""
    return _enabled and x.device.type == "cpu"


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Within it nothing is done in a CPU's way: for a forecast of what a GPU will do."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
