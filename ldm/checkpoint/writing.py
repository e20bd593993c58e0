"""Writing checkpoints: whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ldm.files import atomic_write


def save_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """`torch.save` that leaves the old file whole if it does not finish."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def save_state_dict(state_dict: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Write weights as `.safetensors`, or as a `.ckpt` that holds `{"state_dict": ...}`, by the suffix of `path`."""
    if Path(path).suffix != ".safetensors":
        save_checkpoint({"state_dict": dict(state_dict)}, path)
        return
    with atomic_write(path) as temporary:
        save_file({key: value.contiguous().clone() for key, value in state_dict.items()}, temporary, {"format": "pt"})
