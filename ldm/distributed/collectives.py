"""Values that the processes of a run exchange. Imports torch.distributed only when a function is called."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, distributed

from ldm.distributed.ranks import Launch

_stores: list[Any] = []  # a store that this process serves must live as long as others read it


def said_by_first(text: str, launch: Launch) -> str:
    """Return the `text` of the first process of `launch`, in each of its processes. Each process must call this once.

    The text goes through a store at the address where torch.distributed will later meet.
    """
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from torch.distributed import rendezvous

    try:
        environment = TorchElasticEnvironment() if launch.launcher == "torchrun" else SLURMEnvironment()
    except RuntimeError:  # which the Trainer will meet as well, and explain
        return text
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    rank = environment.global_rank()
    store, _, _ = next(rendezvous("env://", rank, launch.processes * launch.machines))
    _stores.append(store)
    key = f"latent-finetune/said_by_first/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        store.set(key, text)
    return store.get(key).decode()


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of `values` over the processes that train together. All must give the same shape."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
