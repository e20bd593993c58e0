"""Writing of LoRA files in the format of kohya."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import is_finite, save_state_dict
from ldm.locks import locked_file
from ldm.release.families import Family
from ldm.release.model_spec import described_lora
from ldm.release.opening import check_not_replaced
from ldm.util import refuse_if

log = logging.getLogger(__name__)


@contextmanager
def lora_to_write(out: Path, inputs: Sequence[Path]) -> Iterator[None]:
    """Hold the lock of the file `out`, in which the block saves a LoRA that is made from the files `inputs`.

    Raises:
        UserError: `out` has another suffix, is one of `inputs`, or is being written by another process.
    """
    refuse_if(out.suffix != ".safetensors", f"{out}: the name must end in .safetensors, the format of LoRA files")
    check_not_replaced(out, inputs)
    with locked_file(out):
        yield


def kohya_tensors(name: str, down: Tensor, up: Tensor, alpha: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the entries of a file for the layer `name` with A `down` and B `up`, in `dtype`.

    Raises:
        UserError: a factor is too large for `dtype`.
    """
    factors = {"lora_down.weight": down.to(dtype), "lora_up.weight": up.to(dtype).contiguous()}
    refuse_if(
        not all(map(is_finite, factors.values())), f"{name}: its change is too large for {dtype}; leave out --half"
    )
    values = {**factors, "alpha": torch.tensor(alpha, dtype=dtype)}
    return {f"{name}.{key}": value.cpu() for key, value in values.items()}


def save_lora(
    layers: Mapping[str, Mapping[str, Tensor]], out: Path, family: Family | None, rank: str, alpha: str | None = None
) -> None:
    """Write the `layers`, their `kohya_tensors` by name, to `out`. See `described_lora` for the other arguments."""
    tensors = {key: value for layer in layers.values() for key, value in layer.items()}
    save_state_dict(tensors, out, metadata=described_lora(out, family, rank, alpha))
    log.info("wrote %s (%.1f MB, %d layers)", out, out.stat().st_size / 1e6, len(layers))
