"""Tensors that FSDP partitions among the processes (DTensors): weights, gradients and optimizer state."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Return True if weights of `module` are partitioned. All processes must then call it together."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of `tensor`, in the same memory; `tensor` itself if it is not partitioned."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full `tensor`. If it is partitioned, all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of `full` that corresponds to `like`; `full` itself if `like` is not partitioned."""
    if not isinstance(like, DTensor):
        return full
    shard = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return shard.clone()  # a view would keep the full tensor in memory


def gather_on_first(value: Any, is_first: bool) -> Any:
    """Return `value`, including lists and dicts, with partitioned tensors gathered in host memory.

    All processes must call this together. Only the first gets usable values.
    """
    if isinstance(value, dict):
        return {key: gather_on_first(part, is_first) for key, part in value.items()}
    if isinstance(value, list):
        return [gather_on_first(part, is_first) for part in value]
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if is_first else None
