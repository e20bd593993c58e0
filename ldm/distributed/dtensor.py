"""Weights, gradients and optimizer state that FSDP partitions among processes (DTensors)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_partitioned(module: nn.Module) -> bool:
    """Return True if any weight of `module` is partitioned."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of `tensor`, sharing its memory; `tensor` itself if it is not partitioned."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full `tensor`. If it is partitioned, all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def partition_like(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of `full` that corresponds to `like`; `full` itself if `like` is not partitioned."""
    if not isinstance(like, DTensor):
        return full
    part = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # a view would keep the full tensor in memory


def gather_on_first(value: Any, is_first: bool) -> Any:
    """Gather the partitioned tensors in `value`, nested lists and dicts included, in the first process's host memory.

    All processes must call this together. The others get None in place of each partitioned tensor.
    """
    if isinstance(value, dict):
        return {key: gather_on_first(part, is_first) for key, part in value.items()}
    if isinstance(value, list):
        return [gather_on_first(part, is_first) for part in value]
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if is_first else None
