"""Structure of a training checkpoint, checked as a whole before a run takes it up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from ldm.checkpoint import in_memory, is_finite
from ldm.optim import QUANTISED
from ldm.util import UserError

VERSION = "pytorch-lightning_version"


def check_structure(content: Mapping[str, Any], path: str | Path, loops: Mapping[str, Any]) -> None:
    """Check what a resume takes up: weights, progress, optimizers, schedules and callbacks.

    `loops` is the progress of a trainer that has not begun, whose entries a checkpoint must have.

    Raises:
        UserError: an entry is missing, has another type or range, or holds a number that is not finite.
    """
    try:
        for message in _faults(content, loops):
            raise UserError(f"{path}: cannot be resumed ({message})")
    except RecursionError:
        raise UserError(f"{path}: cannot be resumed (its entries are nested too deeply)") from None


def _faults(content: Mapping[str, Any], loops: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each entry that a resume cannot use, in the order of the file."""
    for key in ("epoch", "global_step"):
        if not _is_count(content.get(key)):
            yield f"{key} {content.get(key)!r:.60} is not a count"
    yield from _version(content.get(VERSION))
    yield from _tensors(content["state_dict"], "state_dict")
    yield from _progress(content["loops"], loops, "loops")
    yield from _optimizers(content["optimizer_states"])
    yield from _schedules(content["lr_schedulers"])
    yield from _states(content.get("callbacks", {}))
    rate = content.get("learning_rate", 0.0)
    if not _is_number(rate):
        yield f"learning_rate {rate!r:.60} is not a finite number"


def _version(value: Any) -> Iterator[str]:
    try:
        Version(value)
    except (InvalidVersion, TypeError):
        yield f"{VERSION} {value!r:.60} is not a version"


def _tensors(values: Any, where: str) -> Iterator[str]:
    if not isinstance(values, Mapping):
        yield f"{where} is not a mapping"
        return
    for key, value in values.items():
        if not isinstance(key, str):
            yield f"{where} has the key {key!r:.60}, which is not a string"
        elif not isinstance(value, Tensor):
            yield f"{where}.{key} is not a tensor"
        elif not _finite(value):
            yield f"{where}.{key} has values that are not finite"


def _progress(given: Any, expected: Any, where: str) -> Iterator[str]:
    """Compare the progress with that of a trainer that has not begun; entries that it lacks are free."""
    if isinstance(expected, Mapping):
        if not isinstance(given, Mapping):
            yield f"{where} is not a mapping"
            return
        for key, value in expected.items():
            if key not in given:
                yield f"{where}.{key} is missing"
            else:
                yield from _progress(given[key], value, f"{where}.{key}")
    elif isinstance(expected, bool):
        if not isinstance(given, bool):
            yield f"{where} {given!r:.60} is not true or false"
    elif not _is_count(given):
        yield f"{where} {given!r:.60} is not a count"


def _optimizers(states: Any) -> Iterator[str]:
    for number, state in enumerate(states):
        where = f"optimizer_states[{number}]"
        groups, kept = state.get("param_groups"), state.get("state")
        if not isinstance(groups, list) or not isinstance(kept, Mapping):
            yield f"{where} has no param_groups or no state"
            continue
        known: set[int] = set()
        for position, group in enumerate(groups):
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
                yield f"{where}.param_groups[{position}] lists no params"
            elif not all(_is_count(parameter) for parameter in group["params"]):
                yield f"{where}.param_groups[{position}].params are not numbers of parameters"
            else:
                known |= set(group["params"])
                yield from _finite_numbers(group, f"{where}.param_groups[{position}]")
                if not _is_number(group.get("lr")):
                    yield f"{where}.param_groups[{position}].lr {group.get('lr')!r:.60} is not a finite number"
        for parameter, entries in kept.items():
            if parameter not in known or not isinstance(entries, Mapping):
                yield f"{where}.state[{parameter!r:.20}] is of no parameter"
            else:
                yield from _finite_numbers(entries, f"{where}.state[{parameter}]")
        yield from _alike([entries for entries in kept.values() if isinstance(entries, Mapping)], f"{where}.state")


def _alike(states: list[Mapping[str, Any]], where: str) -> Iterator[str]:
    """Compare the states of the parameters: an optimizer keeps the same entries, of the same kinds, for each."""
    kinds = [tuple(sorted((str(key), _kind(value)) for key, value in state.items())) for state in states]
    usual = Counter(kinds).most_common(1)[0][0] if kinds else ()
    for number, found in enumerate(kinds):
        if found != usual:
            named = ", ".join(f"{key} ({kind})" for key, kind in usual)
            yield f"{where}[{number}] is unlike the others, which have {named}"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):  # a moment in few bits, see `ldm.optim.low_bit`
        return "values" if set(value) == QUANTISED and isinstance(value["codes"], Tensor) else "mapping"
    if isinstance(value, Tensor):
        return "number" if value.ndim == 0 else "values"
    return "number" if _is_number(value) else type(value).__name__


def _schedules(states: Any) -> Iterator[str]:
    if not isinstance(states, list) or not all(isinstance(state, Mapping) for state in states):
        yield "lr_schedulers are not a list of mappings"
        return
    for number, state in enumerate(states):
        where = f"lr_schedulers[{number}]"
        if not _is_count(state.get("last_epoch")):
            yield f"{where}.last_epoch {state.get('last_epoch')!r:.60} is not a count"
        for key in ("base_lrs", "_last_lr"):
            rates = state.get(key, [])
            if not isinstance(rates, list) or not all(map(_is_number, rates)):
                yield f"{where}.{key} are not finite numbers"


def _states(callbacks: Any) -> Iterator[str]:
    if not isinstance(callbacks, Mapping) or not all(isinstance(key, str) for key in callbacks):
        yield "callbacks is not a mapping"
        return
    for name, state in callbacks.items():
        if not isinstance(state, Mapping):
            yield f"callbacks.{name!r:.60} is not a mapping"
    seed = callbacks.get("StepSeeds", {}).get("seed", 0) if isinstance(callbacks.get("StepSeeds", {}), Mapping) else 0
    if not _is_count(seed) or seed >= 2**32:
        yield f"callbacks.StepSeeds.seed {seed!r:.60} is not a seed"


def _finite_numbers(entries: Mapping[Any, Any], where: str) -> Iterator[str]:
    """Yield a message for each number or tensor below `entries` that is not finite."""
    for key, value in entries.items():
        if isinstance(value, Tensor):
            if not _finite(value):
                yield f"{where}.{key} has values that are not finite"
        elif isinstance(value, Mapping):
            yield from _finite_numbers(value, f"{where}.{key}")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{where}.{key} is {value}"


def _finite(tensor: Tensor) -> bool:
    return tensor.is_meta or is_finite(in_memory(tensor))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and _finite(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
