"""Number formats that the processor has no instructions for, which it emulates, often tens of times slower."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if `device` is a processor that computes `dtype`, bfloat16 or float16, by other instructions."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def quick_dtype(dtype: torch.dtype, device: torch.device, name: str) -> torch.dtype:
    """Return `dtype`, or float32 with a warning if `device` emulates it. `name` is the option with its value."""
    if not is_emulated(dtype, device):
        return dtype
    log.warning("%s: this processor has to emulate it, which is many times slower; float32 is used", name)
    return torch.float32
