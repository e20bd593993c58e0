"""Grafting: a training checkpoint gets the weights of a release in place of its own.

`main.py --resume` takes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import SCHEDULE_KEYS, Pending, cast, ema_key, is_optional
from ldm.checkpoint.causes import likely_cause
from ldm.checkpoint.formats import can_hold
from ldm.checkpoint.keys import (
    EMA,
    EMA_DECAY,
    EMA_UPDATES,
    MODEL,
    TEXT_ENCODERS,
    UNUSED_BY_TOWERS,
    has_part,
    with_ema_as_weights,
)
from ldm.checkpoint.names import is_carried
from ldm.util import UserError, refuse_if

Weights = Mapping[str, torch.Tensor]

# Callbacks whose state refers to the replaced weights, as evaluation/start.safetensors does.
_OF_THE_WEIGHTS = ("Forgetting",)
# Values that the training's config determines.
_OWN = (*SCHEDULE_KEYS, EMA_DECAY)


@dataclass
class Graft:
    """State dict that holds released weights, and the origin of each key."""

    state_dict: dict[str, torch.Tensor | Pending] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)  # EMA weights, taken from the release's EMA or weights
    kept: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # keys of the release that the training lacks

    def summary(self) -> list[str]:
        """Return one line per kind of key, with its count."""
        cond_stage = sum(key.startswith(TEXT_ENCODERS) and not is_optional(key) for key in self.skipped)
        ema = sum(key.startswith(EMA) for key in self.skipped)
        lines = [
            (len(self.released), "weights taken from the release"),
            (len(self.averaged), "EMA weights taken from the release"),
            (len(self.kept), "values of the training kept, such as the noise schedule"),
            (cond_stage, "text encoder weights of the release skipped: this training has no text encoder"),
            (ema, "EMA weights of the release skipped: the training has no such EMA weights"),
            (len(self.skipped) - cond_stage - ema, "other values of the release skipped, such as the noise schedule"),
        ]
        return [f"{count} {line}" for count, line in lines if count]


def graft(state_dict: Weights, release: Weights, source: str | Path) -> Graft:
    """Replace every weight of a training's `state_dict` by that of `release`, cast to the training's dtype.

    The noise schedule of the training is kept. EMA weights come from the release's EMA, or from its weights if it has
    no EMA. A tensor on the meta device is a weight without a value. `source` names the release in messages.

    Raises:
        UserError: a shape differs, the release lacks a weight, or it has a weight that the training lacks.
    """
    result = Graft()
    release = with_ema_as_weights(release, state_dict)
    cause = "is it a release of another model?"
    origins = _ema_origins(state_dict, release)
    for key, own in state_dict.items():
        origin = origins.get(key, key)
        if own.is_meta and origin not in release and is_optional(key, UNUSED_BY_TOWERS):
            own = torch.zeros(own.shape, dtype=own.dtype)  # folders of diffusers lack it
        if key in _OWN or origin not in release:
            if own.is_meta or not (is_optional(key) or is_carried(key)):
                raise UserError(
                    f"{source}: lacks {origin}, which the training has; {likely_cause(release, state_dict, cause)}"
                )
            result.kept.append(key)
            result.state_dict[key] = own
            continue
        value = release[origin]
        if value.shape != own.shape:
            shapes = f"{tuple(value.shape)}, but {tuple(own.shape)} in the training"
            raise UserError(f"{source}: {origin} has shape {shapes}; {likely_cause(release, state_dict, cause)}")
        refuse_if(
            not can_hold(own.dtype, value.dtype),
            f"{source}: {origin} is {value.dtype}, but {own.dtype} in the training; dequantise it and save "
            "it as floating-point numbers",
        )
        (result.averaged if key in origins else result.released).append(key)
        result.state_dict[key] = cast(value, own.dtype)
    if EMA_UPDATES in state_dict and not origins.keys() <= release.keys():
        # The average restarts. A negative number means that updates are not counted.
        result.state_dict[EMA_UPDATES] = state_dict[EMA_UPDATES].clamp(max=0)

    used = {*state_dict, *origins.values()}
    result.skipped = [key for key in release if key not in used]
    absent = tuple(part for part in TEXT_ENCODERS if not has_part(state_dict, part))
    for key in result.skipped:
        if not is_optional(key) and not key.startswith(absent):
            raise UserError(
                f"{source}: has {key}, which the training lacks; {likely_cause(release, state_dict, cause)}"
            )
    return result


def _ema_origins(state_dict: Weights, release: Weights) -> dict[str, str]:
    """Map the EMA keys of `state_dict` to EMA keys of `release`, or to its weights if an EMA key is missing."""
    shadows = {ema_key(key): key for key in state_dict if key.startswith(MODEL)}
    shadows = {shadow: key for shadow, key in shadows.items() if shadow in state_dict}
    if shadows.keys() <= release.keys():
        return {shadow: shadow for shadow in shadows}
    return shadows


def grafted_checkpoint(training: Mapping[str, Any], grafted: Graft) -> dict[str, Any]:
    """Return the Lightning checkpoint `training` with the weights of `grafted` and without optimizer moments.

    Loops, step, schedulers and the optimizers' param groups are kept.
    """
    optimizers = [{**state, "state": {}} for state in training["optimizer_states"]]
    grafted_content = {**training, "state_dict": grafted.state_dict, "optimizer_states": optimizers}
    if "callbacks" in training:
        kept = {key: state for key, state in training["callbacks"].items() if key not in _OF_THE_WEIGHTS}
        grafted_content["callbacks"] = kept
    return grafted_content
