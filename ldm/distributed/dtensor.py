"""Tensors that are sharded among the processes (DTensors), as FSDP does it to weights, gradients, optimizer state."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of `module` are sharded; then it computes only if all processes call it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a `tensor`, in the same memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full `tensor`, gathered if it is sharded, which takes all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """`full`, of which each process has all, sharded as `like` is; itself if that is not."""
    if not isinstance(like, DTensor):
        return full
    shard = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return shard.clone()  # else it keeps all of it in memory


def gather_on_first(value: Any, is_first: bool) -> Any:
    """`value`, lists and dicts included, with the sharded tensors in it gathered in the host's memory.

    All processes must call it, and only the one that `is_first` gets them: what the others get is not to be used.
    """
    if isinstance(value, dict):
        return {key: gather_on_first(part, is_first) for key, part in value.items()}
    if isinstance(value, list):
        return [gather_on_first(part, is_first) for part in value]
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if is_first else None
