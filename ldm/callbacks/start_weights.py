"""Initial weights of training, read from a file one parameter at a time, so that memory holds no second model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import in_memory, is_optional, open_checkpoint, weights_of
from ldm.checkpoint.keys import is_factor
from ldm.checkpoint.names import in_our_names
from ldm.distributed.dtensor import local_tensor, partition_like
from ldm.util import UserError, refuse_if

log = logging.getLogger(__name__)

Starts = Mapping[nn.Parameter, Tensor]
Groups = Sequence[Mapping[str, Any]]


def read_starts(path: Path, groups: Groups, module: nn.Module, callback: str) -> Starts:
    """Return the initial value of each parameter in `groups`, memory-mapped, except optional ones that the file lacks.

    `callback` is the name in messages.

    Raises:
        UserError: the file cannot be read or does not hold the trained parameters.
    """
    opened = open_checkpoint(path)
    names = {parameter: name for name, parameter in module.named_parameters()}
    weights = in_our_names(weights_of(opened.content, path), list(names.values())).weights
    starts = {}
    for parameter in (parameter for group in groups for parameter in group["params"]):
        name, shape = names[parameter], tuple(parameter.shape)
        refuse_if(
            is_factor(name),
            f"{callback}: a LoRA starts without a change, so the optimizer's own weight_decay pulls to the start; "
            "leave this callback out",
        )
        if name in weights and weights[name].shape == shape:
            starts[parameter] = weights[name]
        elif name in weights or not is_optional(name):
            found = f"has the shape {tuple(weights[name].shape)}" if name in weights else "is missing"
            raise UserError(
                f"{callback}: {path}: {name} {found}, and the trained weight has {shape}; "
                "name the weights that training began from"
            )
    return starts


def start_of(starts: Starts, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """Read the initial value of this process's part of `parameter`, on its device, in `dtype`."""
    part = partition_like(in_memory(starts[parameter]), parameter)
    return local_tensor(part).to(parameter.device, dtype)


def set_weight_decay(group: dict[str, Any], value: float | None, callback: str) -> None:
    """Set the optimizer's own decay in `group` to `value` unless it is None. Warn of a decay that is not 0."""
    if value is not None and "weight_decay" in group:
        group["weight_decay"] = value
    if group.get("weight_decay"):
        log.warning(
            "%s: the optimizer's own weight_decay %s pulls to zero at the same time; "
            "set it to 0 with lightning.callbacks.%s.params.weight_decay=0.0",
            callback, group["weight_decay"], callback,
        )  # fmt: skip
