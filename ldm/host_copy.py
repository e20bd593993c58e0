"""Tensors on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """The host's copy of `tensor`, which must not be changed until it is read: on a CPU it is the tensor itself.

    A CUDA device sends it when it has computed it, and meanwhile nobody waits.
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
        """Whether `get` would not wait."""
        return self._sent is None or self._sent.query()

    def get(self) -> Tensor:
        """The copy, for which this waits; in any thread."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._here
