"""Grafting of released weights into a training checkpoint that `main.py --resume` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import SCHEDULE_KEYS, Pending, cast, ema_key, is_optional
from ldm.checkpoint.causes import likely_cause
from ldm.checkpoint.formats import can_hold
from ldm.checkpoint.keys import EMA, EMA_DECAY, EMA_UPDATES, MODEL, TEXT_ENCODERS, has_part, with_ema_as_weights
from ldm.checkpoint.names import is_carried
from ldm.util import UserError

Weights = Mapping[str, torch.Tensor]

# Callbacks whose state is about the weights that are replaced: the first ones, in evaluation/start.safetensors.
_OF_THE_WEIGHTS = ("Forgetting",)
# What the training's config says.
_OWN = (*SCHEDULE_KEYS, EMA_DECAY)


@dataclass
class Graft:
    """State dict with released weights in it, and where its keys came from."""

    state_dict: dict[str, torch.Tensor | Pending] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)  # EMA weights, from the released EMA or weights
    kept: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # of the release: the training has no place for them

    def summary(self) -> list[str]:
        """Return one line for each kind of key, with counts."""
        cond_stage = sum(key.startswith(TEXT_ENCODERS) and not is_optional(key) for key in self.skipped)
        ema = sum(key.startswith(EMA) for key in self.skipped)
        lines = [
            (len(self.released), "weights taken from the release"),
            (len(self.averaged), "EMA weights taken from the release"),
            (len(self.kept), "values kept as the training has them (noise schedule and the like)"),
            (cond_stage, "cond stage weights of the release skipped, by design: this training has none"),
            (ema, "EMA weights of the release skipped: the training keeps none, or other ones"),
            (len(self.skipped) - cond_stage - ema, "other values of the release skipped (noise schedule and the like)"),
        ]
        return [f"{count} {what}" for count, what in lines if count]


def graft(state_dict: Weights, release: Weights, source: str | Path) -> Graft:
    """Replace every weight of a training's `state_dict` by that of `release`, cast to the dtype that training has.

    The noise schedule stays the training's. EMA weights become the release's EMA, or its weights where it has none.
    Tensors on the meta device stand for weights that have no value yet. `source` names the release in messages.

    Raises:
        UserError: a shape differs, the release lacks a weight, or it has one that the training has no place for.
    """
    result = Graft()
    release = with_ema_as_weights(release, state_dict)
    cause = "is it a release of another model?"
    origins = _ema_origins(state_dict, release)
    for key, own in state_dict.items():
        origin = origins.get(key, key)
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
            shapes = f"{tuple(value.shape)}, in the training {tuple(own.shape)}"
            raise UserError(f"{source}: {origin} has shape {shapes}; {likely_cause(release, state_dict, cause)}")
        if not can_hold(own.dtype, value.dtype):
            raise UserError(
                f"{source}: {origin} is {value.dtype}, in the training {own.dtype}; save it as floating-point numbers "
                "(a quantised model: dequantise it)"
            )
        (result.averaged if key in origins else result.released).append(key)
        result.state_dict[key] = cast(value, own.dtype)
    if EMA_UPDATES in state_dict and not origins.keys() <= release.keys():
        # The average starts anew. A negative number means that updates are not counted.
        result.state_dict[EMA_UPDATES] = state_dict[EMA_UPDATES].clamp(max=0)

    used = {*state_dict, *origins.values()}
    result.skipped = [key for key in release if key not in used]
    absent = tuple(part for part in TEXT_ENCODERS if not has_part(state_dict, part))
    for key in result.skipped:
        if not is_optional(key) and not key.startswith(absent):
            raise UserError(f"{source}: {key} has no place in the training; {likely_cause(release, state_dict, cause)}")
    return result


def _ema_origins(state_dict: Weights, release: Weights) -> dict[str, str]:
    """Return the key of `release` that each EMA weight of `state_dict` starts from: all EMA, or all weights."""
    shadows = {ema_key(key): key for key in state_dict if key.startswith(MODEL)}
    shadows = {shadow: key for shadow, key in shadows.items() if shadow in state_dict}
    if shadows.keys() <= release.keys():
        return {shadow: shadow for shadow in shadows}
    return shadows


def grafted_checkpoint(training: Mapping[str, Any], grafted: Graft) -> dict[str, Any]:
    """Return the Lightning checkpoint `training` with the grafted weights and without its optimizers' moments.

    Loops, step, schedulers and the optimizers' param groups stay.
    """
    optimizers = [{**state, "state": {}} for state in training["optimizer_states"]]
    grafted_content = {**training, "state_dict": grafted.state_dict, "optimizer_states": optimizers}
    if "callbacks" in training:
        kept = {key: state for key, state in training["callbacks"].items() if key not in _OF_THE_WEIGHTS}
        grafted_content["callbacks"] = kept
    return grafted_content
