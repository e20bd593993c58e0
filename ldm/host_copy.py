"""Asynchronous copies of tensors from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copy of `tensor` on the host. On a CPU it is the tensor itself, so the tensor must not change before it is read.

    A CUDA device sends the copy after it has computed the tensor, and nothing waits meanwhile.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._sent: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._here = tensor.detach().cpu()
            return
        self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # else sending would wait
        self._here.copy_(tensor.detach(), non_blocking=True)
        self._sent = torch.cuda.current_stream(tensor.device).record_event()

    @property
    def has_arrived(self) -> bool:
        """True if `get` does not wait."""
        return self._sent is None or self._sent.query()

    def get(self) -> Tensor:
        """Return the copy, and wait for it if it has not arrived. Any thread may call this."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._here
