"""Loading of weights into a module."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm.checkpoint.autoencoders import autoencoder_of, is_autoencoder
from ldm.checkpoint.causes import likely_cause
from ldm.checkpoint.formats import can_hold
from ldm.checkpoint.keys import (
    DEPTH_STAGE,
    EMA,
    FACTORS,
    MODEL,
    OPTIONAL_KEYS,
    TEXT_ENCODERS,
    has_part,
    is_factor,
    is_optional,
    with_ema_as_weights,
)
from ldm.checkpoint.mapped import in_memory
from ldm.checkpoint.names import in_our_names
from ldm.checkpoint.reading import load_state_dict
from ldm.checkpoint.schedule_comparison import without_schedule
from ldm.util import UserError

log = logging.getLogger(__name__)

_PART_BYTES = 2**26


class LoadReport(NamedTuple):
    """Optional keys that are missing in the weights, and unexpected ones that the module lacks."""

    missing: list[str]
    unexpected: list[str]


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    *,
    source: str = "the checkpoint",
    optional: Sequence[str] = OPTIONAL_KEYS,
    assign: bool = False,
) -> LoadReport:
    """Load `state_dict` into `module`.

    EMA weights replace the weights if there are no others. The module keeps its noise schedule, and another schedule
    gives a warning.

    Args:
        source: name of the weights in messages.
        optional: shell patterns of keys that may be missing or unexpected. Text encoders, `cond_stage_model.*` or
            `conditioner.*`, may also be unexpected if the module has none. All factors of a LoRA may be missing.
        assign: assign the tensors to the module. Otherwise they are copied, some megabytes at a time.

    Raises:
        UserError: a shape or a kind of dtype differs, or a required key is missing or unexpected. The message names the
            likely cause, and nothing is loaded.
    """
    own = module.state_dict()
    if not has_part(state_dict, MODEL) and has_part(state_dict, EMA) and has_part(own, MODEL):
        log.info("%s: has only EMA weights, which are loaded as the weights", source)
        state_dict = with_ema_as_weights(state_dict, own)
    cause = "is this a checkpoint of another model?"
    loaded = without_schedule(state_dict, module, own, source)
    for key, value in loaded.items():
        if key in own and value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, the model's is {tuple(own[key].shape)}"
            raise UserError(f"{source}: {key} has shape {shapes}; {likely_cause(state_dict, own, cause)}")
        if key in own and not can_hold(own[key].dtype, value.dtype):
            raise UserError(
                f"{source}: cannot be loaded: {key} is {value.dtype}, the model's is {own[key].dtype}; "
                "save it as floating-point numbers (a quantised model: dequantise it)"
            )
    optional = list(optional)
    optional += [] if any(map(is_factor, state_dict)) else FACTORS
    optional += [f"{part}*" for part in (*TEXT_ENCODERS, DEPTH_STAGE) if not has_part(own, part)]
    report = LoadReport([key for key in own if key not in state_dict], [key for key in state_dict if key not in own])
    for keys, what in zip(report, ("lacks", "has unexpected"), strict=True):
        required = [key for key in keys if not is_optional(key, optional)]
        if required:
            raise UserError(f"{source}: {what} {_some(required)}; {likely_cause(state_dict, own, cause)}")
        if keys:
            log.info("%s: %s %s (optional)", source, what, _some(keys))
    for part in _parts(loaded):
        values = part if assign else {key: in_memory(value) for key, value in part.items()}
        try:
            module.load_state_dict(values, strict=False, assign=assign)
        except RuntimeError as error:  # a dtype that torch cannot convert
            reason = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
            raise UserError(f"{source}: cannot be loaded: {reason}") from error
    return report


def load_file_into(
    module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (), prefix: str = ""
) -> LoadReport:
    """Load the weights of the file at `path` into `module`, except for keys that start with one of `ignore_keys`.

    With `prefix`, only keys with this prefix are loaded, after its removal. Key names of other programs are translated
    and logged. An autoencoder also takes its weights from a release.

    Raises:
        UserError: the file cannot be read, or does not match the module.
    """
    own = [prefix + key for key in module.state_dict()]
    found = load_state_dict(path)
    renamed = in_our_names(autoencoder_of(found, path) if is_autoencoder(own) else found, own)
    for line in renamed.summary():
        log.info("%s: %s", path, line)
    weights = {
        key.removeprefix(prefix): value
        for key, value in renamed.weights.items()
        if key.startswith(prefix) and not key.startswith(tuple(ignore_keys))
    }
    optional = (*OPTIONAL_KEYS, *(f"{key}*" for key in ignore_keys))
    return load_into(module, weights, source=str(path), optional=optional)


def _parts(state_dict: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `state_dict` in parts of at least `_PART_BYTES`."""
    part, size = {}, 0
    for key, value in state_dict.items():
        part[key] = value
        size += value.nbytes
        if size >= _PART_BYTES:
            yield part
            part, size = {}, 0
    yield part


def _some(keys: Sequence[str], shown: int = 3) -> str:
    more = f", … ({len(keys)} keys)" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
