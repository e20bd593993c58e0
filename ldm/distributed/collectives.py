"""What the processes of a launch must agree on before they train together. Imports torch only when it is asked."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, distributed

from ldm.distributed.ranks import Launch

_stores: list[Any] = []  # one that this process serves must live as long as others may ask it


def said_by_first(text: str, launch: Launch) -> str:
    """The `text` of the first process of a `launch`, in each of its processes; each must call this once.

    It goes through the store where torch.distributed will have them meet, at the address that Lightning will name.
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
    """The mean of `values`, of one shape everywhere, over the processes that train together, if there are several."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
