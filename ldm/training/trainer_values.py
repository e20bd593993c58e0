"""Check of the values of Trainer arguments. Lightning itself refuses some wrong values late, and ignores others.

Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ldm.training.trainer_2022 import RENAMED, STRATEGIES
from ldm.util import UserError, refuse_if

# Arguments that have another place → advice.
_ELSEWHERE = {
    "callbacks": "describe each under lightning.callbacks, with target and params",
    "plugins": "plugins cannot be given; --precision and --strategy choose them",
    "default_root_dir": "run folders are made in --logdir",
    "model_registry": "checkpoints are kept in the run folder, and in no registry",
}
_MOST_DEVICES = 256
_MOST_MACHINES = 4096
_TOO_LARGE = 1 << 63  # torch takes smaller whole numbers
_CLOCK = re.compile(r"\d+:[0-2]?\d:[0-5]?\d:[0-5]?\d")
_TIME_UNITS = {"weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds"}
_DURATION = "a time as DD:HH:MM:SS, such as 00:12:00:00, or a mapping such as {hours: 12}"


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: _is_whole(value, least), f"a whole number of at least {least}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_whole(value, 0) or (type(value) is float and 0 <= value <= 1)


def _is_duration(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(key in _TIME_UNITS and _is_number(part) and part >= 0 for key, part in value.items())
    return isinstance(value, str) and _CLOCK.fullmatch(value) is not None


def _is_interval(value: Any) -> bool:
    return _is_whole(value, 1) or (type(value) is float and 0 < value <= 1) or _is_duration(value)


def _are_devices(value: Any) -> bool:
    """Return False for a count of devices, each with a process, that would stop the machine."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value.strip()[:9])
    return not isinstance(value, (int, float)) or (type(value) is int and -1 <= value <= _MOST_DEVICES)


def _are_gpus(value: Any) -> bool:
    """Return False for values that are neither a count of GPUs nor text or numbers that name them."""
    if isinstance(value, list):
        return all(_is_whole(part, 0) for part in value)
    return isinstance(value, str) or (_is_whole(value, -1) and value <= _MOST_DEVICES)


_BOOLEAN = (lambda value: type(value) is bool, "true or false")
_SHARE = (_is_share, "a whole number of batches, or a fraction from 0.0 to 1.0")
_TEXT = (lambda value: isinstance(value, str), "a name")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_epochs", "max_steps", "num_sanity_val_steps"), _whole(-1)),
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch"), _whole(1)),
    "num_nodes": (lambda value: _is_whole(value, 1) and value <= _MOST_MACHINES, f"1 to {_MOST_MACHINES} machines"),
    "devices": (_are_devices, f"a number of devices up to {_MOST_DEVICES}, a list of their numbers, or auto"),
    "num_processes": (lambda value: _is_whole(value, 1) and value <= _MOST_DEVICES, f"1 to {_MOST_DEVICES} processes"),
    **dict.fromkeys(
        ("min_epochs", "min_steps", "log_every_n_steps", "reload_dataloaders_every_n_epochs"), _whole(0)
    ),
    **dict.fromkeys(
        ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"),
        _SHARE,
    ),
    **dict.fromkeys(
        (
            "barebones", "benchmark", "detect_anomaly", "enable_autolog_hparams",
            "enable_checkpointing", "enable_model_summary", "enable_progress_bar", "inference_mode",
            "reload_dataloaders_every_epoch", "sync_batchnorm",
            "use_distributed_sampler",
        ),
        _BOOLEAN,
    ),
    "distributed_backend": (lambda value: value in tuple(STRATEGIES), f"one of {', '.join(STRATEGIES)}"),
    "gpus": (_are_gpus, "device numbers such as 0, or 0,1, or a count such as 2"),
    "weights_summary": (lambda value: value in ("top", "full", "None", "none", ""), "top, full or null"),
    "deterministic": (lambda value: type(value) is bool or value == "warn", "true, false or warn"),
    "fast_dev_run": (lambda value: type(value) is bool or _is_whole(value, 0), "true, false or a number of batches"),
    "gradient_clip_algorithm": (lambda value: value in ("norm", "value"), "norm or value"),
    "gradient_clip_val": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "logger": (lambda value: type(value) is bool, "true or false, and describe a logger in lightning.logger"),
    "max_time": (_is_duration, _DURATION),
    "precision": (lambda value: isinstance(value, str) or _is_whole(value, 1), "16, 32 or a name such as bf16-mixed"),
    "profiler": (lambda value: value in ("simple", "advanced", "pytorch"), "simple, advanced or pytorch"),
    "progress_bar_refresh_rate": _whole(0),
    "accelerator": (lambda value: isinstance(value, str), "auto, cpu, gpu or another device of Lightning"),
    "strategy": (lambda value: isinstance(value, str), "a name, and describe one with settings in lightning.strategy"),
    "val_check_interval": (_is_interval, f"1 or more batches, a fraction above 0.0 up to 1.0, or {_DURATION}"),
}  # fmt: skip


# Arguments for which null is a value of its own; for others it is the default.
_NULLABLE = {"check_val_every_n_epoch", "weights_summary"}


def without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer's arguments without those that are null where that means the default."""
    return {name: value for name, value in given.items() if value is not None or name in _NULLABLE}


def check_values(given: Mapping[str, Any]) -> None:
    """Check the values of Trainer arguments, under their names of today or of 2022. Null means the default.

    Raises:
        UserError: a value is not valid, or the argument has another place.
    """
    for name, value in given.items():
        if name in _ELSEWHERE:
            raise UserError(f"lightning.trainer.{name} {value!r}: {_ELSEWHERE[name]}")
        refuse_if(
            type(value) is int and abs(value) >= _TOO_LARGE,
            f"lightning.trainer.{name} {value}: too large; give a number below 2^63",
        )
        now = RENAMED.get(name, name)
        if value is None or now not in _CHECKS:
            continue
        is_right, expected = _CHECKS[now]
        refuse_if(not is_right(value), f"lightning.trainer.{name} {value!r}: give {expected}")
