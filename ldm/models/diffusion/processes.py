"""What the processes of one training tell each other."""

from __future__ import annotations

from torch import Tensor, distributed


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of `values`, of one shape everywhere, over the processes that train together, if there are several."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
