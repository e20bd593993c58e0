"""Check of the whole structure of a training checkpoint, before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from ldm.checkpoint import SCHEDULE_KEYS, in_memory, is_finite
from ldm.checkpoint.keys import PREDICTION, SCALE_FACTOR
from ldm.models.diffusion.timesteps import STATE as TIMESTEP_STATE
from ldm.modules.diffusionmodules.schedule import PARAMETERIZATIONS
from ldm.release.initial_checkpoint import loops_at_start
from ldm.util import refuse_if

# Further entries that a run takes up: of the distribution of timesteps, and of the scaler of float16 gradients.
_TAKEN_UP = (TIMESTEP_STATE, "MixedPrecision", "ClippedMixedPrecision")
_LIMIT = "growth_rate"  # a setting of Prodigy that is infinite by default
_DATA_MODULES = ("WebDataNpyModuleFromConfig", "DataModuleFromConfig")


def check_structure(content: Mapping[str, Any]) -> None:
    """Check the parts of the checkpoint `content` that a run restores, as Lightning and the callbacks expect them.

    Raises:
        UserError: a part is missing, of a wrong type, or not finite. The message begins with its key.
    """
    _expect(_is_version(content.get("pytorch-lightning_version")), "pytorch-lightning_version", "not a version")
    _expect(_is_count(content.get("global_step")), "global_step", "not a count of steps")
    _expect(_is_count(content.get("epoch", 0)), "epoch", "not a count of epochs")
    rate = content.get("learning_rate")
    _expect(rate is None or _is_number(rate), "learning_rate", "not a finite number")
    predicts = content.get(PREDICTION)
    is_known = predicts is None or (isinstance(predicts, str) and predicts in PARAMETERIZATIONS)
    _expect(is_known, PREDICTION, f"none of {', '.join(PARAMETERIZATIONS)}")
    _check_weights(content["state_dict"])
    _check_optimizers(content["optimizer_states"])
    _check_schedules(content["lr_schedulers"])
    _check_callbacks(content.get("callbacks", {}))
    for key in _TAKEN_UP:
        _check_finite(content.get(key), key)
    for name in _DATA_MODULES:
        if name in content:
            state = content[name]
            _expect(isinstance(state, dict) and _is_count(state.get("seed")), name, "has no seed")
    _check_loops(content["loops"], content["global_step"])


def _expect(is_so: Any, key: str, problem: str) -> None:
    refuse_if(not is_so, f"{key}: {problem}")


def _is_version(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(Version(value))
    except InvalidVersion:
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(torch.isfinite(value).all())
    return type(value) in (int, float) and math.isfinite(value)


def _is_finite(tensor: Tensor) -> bool:
    """Return True if all values are finite, in float32 if they are float64, as no network and optimizer is float64."""
    tensor = in_memory(tensor)
    return is_finite(tensor.float() if tensor.dtype == torch.float64 else tensor)


def _check_weights(weights: Any) -> None:
    _expect(isinstance(weights, dict) and weights, "state_dict", "not a dict of weights")
    for key, value in weights.items():
        _expect(isinstance(key, str), f"state_dict key {key!r:.60}", "not the name of a weight")
        _expect(type(value) is Tensor, f"state_dict.{key}", "not a tensor")
        is_replaced = key in SCHEDULE_KEYS and key != SCALE_FACTOR  # by the schedule of the config
        _expect(is_replaced or _is_finite(value), f"state_dict.{key}", "has values that are not finite")


def _check_optimizers(optimizers: Any) -> None:
    _expect(isinstance(optimizers, list), "optimizer_states", "not a list")
    for number, optimizer in enumerate(optimizers):
        where = f"optimizer_states[{number}]"
        _expect(isinstance(optimizer, dict), where, "not an optimizer state")
        groups, state = optimizer.get("param_groups"), optimizer.get("state")
        _expect(isinstance(groups, list) and groups, f"{where}.param_groups", "not a list of groups")
        _expect(isinstance(state, dict), f"{where}.state", "not a state dict")
        known: set[int] = set()
        for group in groups:
            params = group.get("params") if isinstance(group, dict) else None
            is_list = isinstance(params, list) and all(map(_is_count, params)) and not known & {*params}
            _expect(is_list, f"{where}.param_groups", "not a list of parameter numbers")
            known |= {*params}
            _expect(_is_number(group.get("lr")), f"{where}.param_groups.lr", "not a finite number")
            has_no_limit = type(group.get(_LIMIT)) is float and group[_LIMIT] == math.inf
            _check_finite({**group, _LIMIT: None} if has_no_limit else group, f"{where}.param_groups")
        for index, moments in state.items():
            _expect(type(index) is int and index in known, f"{where}.state {index!r:.60}", "not a parameter number")
            _expect(isinstance(moments, dict), f"{where}.state.{index}", "not a dict of moments")
            are_real = not any(isinstance(part, Tensor) and part.is_complex() for part in moments.values())
            _expect(are_real, f"{where}.state.{index}", "has complex numbers")
            _check_finite(moments, f"{where}.state.{index}")


def _check_finite(value: Any, where: str) -> None:
    for key, part in _leaves(value, where):
        is_finite = _is_finite(part) if isinstance(part, Tensor) else not isinstance(part, float) or math.isfinite(part)
        _expect(is_finite, key, "has values that are not finite")


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{where}.{key!s:.60}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{where}[{number}]")
    else:
        yield where, value


def _check_schedules(schedules: Any) -> None:
    _expect(isinstance(schedules, list), "lr_schedulers", "not a list")
    for number, state in enumerate(schedules):
        where = f"lr_schedulers[{number}]"
        _expect(isinstance(state, dict) and _is_count(state.get("last_epoch")), f"{where}.last_epoch", "not a count")
        bases = state.get("base_lrs", [])
        _expect(isinstance(bases, list) and all(map(_is_number, bases)), f"{where}.base_lrs", "not a list of numbers")
        lambdas = state.get("lr_lambdas", [])
        _expect(
            isinstance(lambdas, list) and len(lambdas) == len(bases),
            f"{where}.lr_lambdas",
            "not one per base_lr",
        )
        for key, part in _leaves({key: part for key, part in state.items() if key != "lr_lambdas"}, where):
            is_plain = part is None or isinstance(part, bool | int | float | str) or _is_number(part)
            _expect(is_plain, key, "not a plain value")
        _check_finite(state, where)


def _check_callbacks(callbacks: Any) -> None:
    _expect(isinstance(callbacks, dict), "callbacks", "not a dict of states")
    for name, state in callbacks.items():
        _expect(isinstance(name, str) and isinstance(state, dict), f"callbacks.{name!s:.60}", "not a state dict")
    if "StepSeeds" in callbacks:
        seed = callbacks["StepSeeds"].get("seed")
        _expect(_is_count(seed) and seed < 2**32, "callbacks.StepSeeds.seed", "not a seed")
    if "NumericalFaults" in callbacks:
        state, where = callbacks["NumericalFaults"], "callbacks.NumericalFaults"
        norms = state.get("norms")
        _expect(isinstance(norms, list) and all(map(_is_number, norms)), f"{where}.norms", "not finite numbers")
        _expect(_is_count(state.get("skipped")), f"{where}.skipped", "not a count")
    for name, state in callbacks.items():
        if name.startswith("KeptCheckpoints"):
            ranked, where = state.get("best_k_models"), f"callbacks.{name:.60}"
            is_ranked = isinstance(ranked, dict) and all(
                isinstance(path, str) and isinstance(score, Tensor) and _is_number(score)
                for path, score in ranked.items()
            )
            _expect(is_ranked, f"{where}.best_k_models", "not a dict of finite scores")
            for key in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"):
                _expect(isinstance(state.get(key), str), f"{where}.{key}", "not a path")
            _expect("best_model_score" in state, f"{where}.best_model_score", "missing")
            _expect(isinstance(state.get("kth_value"), Tensor), f"{where}.kth_value", "not a score")


def _check_loops(loops: Any, step: int) -> None:
    _expect(
        isinstance(loops, dict) and isinstance(loops.get("fit_loop"), dict), "loops.fit_loop", "not a progress dict"
    )
    fit = loops["fit_loop"]
    for key, expected in loops_at_start()["fit_loop"].items():
        if key in fit:  # Lightning skips missing parts
            _check_like(fit[key], expected, f"loops.fit_loop.{key}")
    positions = fit.get("state_dict", {}).get("combined_loader", [])
    _expect(isinstance(positions, list), "loops.fit_loop.state_dict.combined_loader", "not a list of positions")
    for state in positions:
        is_position = isinstance(state, dict) and all(_is_count(state.get(key, 0)) for key in ("epoch", "batch"))
        is_position = is_position and all(type(part) in (int, bool, str) for part in state.values())
        is_whole = is_position and ("samples" not in state or "batch" in state)
        _expect(is_whole, "loops.fit_loop.state_dict.combined_loader", "not a position in the data")
    progress = "epoch_loop.automatic_optimization.optim_progress", "epoch_loop.manual_optimization.optim_step_progress"
    automatic = ((fit.get(progress[0]) or {}).get("optimizer") or {}).get("step")
    counts = [part["total"]["completed"] for part in (automatic, fit.get(progress[1])) if part]
    _expect(
        len(counts) == 2 and step == max(counts), "loops.fit_loop", f"its step counts differ from global_step {step}"
    )


def _check_like(value: Any, expected: Any, where: str) -> None:
    """Raise `UserError` unless `value` has the keys of `expected`, and counts and booleans in the same places."""
    if isinstance(expected, dict):
        _expect(isinstance(value, dict), where, "not a progress dict")
        for key, part in expected.items():
            _expect(key in value, f"{where}.{key}", "missing")
            _check_like(value[key], part, f"{where}.{key}")
    elif isinstance(expected, bool):
        _expect(type(value) is bool, where, "not true or false")
    else:
        _expect(_is_count(value), where, "not a count")
