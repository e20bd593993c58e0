"""Exchange of values and failures among the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ldm.distributed.ranks import Launch
from ldm.util import UserError

T = TypeVar("T")

_stores: list[Any] = []  # a store must live as long as other processes read from it


def broadcast_text(text: str, launch: Launch) -> str:
    """Return the `text` of the first process in all processes of `launch`. Every process must call this once.

    The text is sent through a store at the address that torch.distributed will use later.
    """
    from lightning_fabric.plugins import environments
    from torch.distributed import rendezvous

    try:
        environment = getattr(environments, launch.launcher.environment)()
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


class FailedTogether(UserError):
    """Error of one process that all processes raise at the same place, so that they can still act together."""


def in_all_processes(values: Iterator[T]) -> Iterator[T]:
    """Yield `values`, and stop all processes if one of them fails to produce its next value.

    All processes must have equally many values. They agree on each value, which waits for the device. Lightning waits
    for it at the same place.

    Raises:
        FailedTogether: a process raised a `UserError` for its next value. The message names the process.
    """
    while True:
        failure, value = "", None
        try:
            value = next(values)
        except StopIteration:
            return
        except UserError as error:
            failure = str(error)
        _check_together(failure)
        yield value


def _check_together(failure: str) -> None:
    if not (distributed.is_available() and distributed.is_initialized()):
        if failure:
            raise UserError(failure)
        return
    has_gpu = distributed.get_backend() == "nccl"
    failed = torch.tensor(bool(failure), dtype=torch.int32, device="cuda" if has_gpu else "cpu")
    distributed.all_reduce(failed, op=distributed.ReduceOp.MAX)
    if not failed.item():
        return
    failures: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(failures, failure)
    rank = next(number for number, text in enumerate(failures) if text)
    raise FailedTogether(f"{failures[rank]} (in process {rank} of {len(failures)}, counted from 0)")


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of `values` over the process group. All processes must pass the same shape."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def gathered_over_processes(values: Tensor) -> Tensor:
    """Return the `values` (B, …) of all processes, in the order of their ranks. B may differ among the processes."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    size = torch.tensor(len(values), device=values.device)
    sizes = [torch.zeros_like(size) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, size)
    counts = [int(count) for count in sizes]
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.zeros_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
