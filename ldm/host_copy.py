"""Asynchronous copies of tensors from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copy of `tensor` on the host. For a CPU tensor it is the tensor itself, which must not change before it is read.

    A CUDA device copies the tensor after computing it, without blocking the host.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._sent: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._here = tensor.detach().cpu()
            return
        self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # makes the copy asynchronous
        self._here.copy_(tensor.detach(), non_blocking=True)
        self._sent = torch.cuda.current_stream(tensor.device).record_event()

    @property
    def has_arrived(self) -> bool:
        """True if `get` returns without waiting."""
        return self._sent is None or self._sent.query()

    def get(self) -> Tensor:
        """Wait for the copy and return it. Any thread may call this method."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._here
