"""Exchange of values among the processes of a run."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, distributed

from ldm.distributed.ranks import Launch

_stores: list[Any] = []  # a store must live as long as other processes read from it


def broadcast_text(text: str, launch: Launch) -> str:
    """Return the `text` of the first process in all processes of `launch`. Every process must call this once.

    The text is sent through a store at the address that torch.distributed will use later.
    """
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from torch.distributed import rendezvous

    try:
        environment = TorchElasticEnvironment() if launch.launcher == "torchrun" else SLURMEnvironment()
    except RuntimeError:  # the Trainer will raise it again, with an explanation
        return text
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    rank = environment.global_rank()
    store, _, _ = next(rendezvous("env://", rank, launch.processes * launch.machines))
    _stores.append(store)
    key = f"latent-finetune/broadcast_text/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        store.set(key, text)
    return store.get(key).decode()


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of `values` over the process group. All processes must pass the same shape."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
