"""Settings of a resumed optimizer: those of the present config, and a check of the state from the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

from torch import Size, Tensor
from torch.optim import Optimizer

from ldm.util import UserError, refuse_if, takes

log = logging.getLogger(__name__)

_RATES = ("lr", "initial_lr")  # of LearningRateOnResume
# Settings that choose an implementation, not a result.
_IMPLEMENTATION = ("capturable", "differentiable", "foreach", "fused")
# Settings that need moments of their own, which a state made without them lacks.
_NEED_MOMENTS = ("amsgrad", "centered", "momentum")
# Classes that keep the second moments of a matrix as the means of its rows and of its columns.
_FACTORED = ("Adafactor", "CAME")
# Settings by which a state of another class is told, where all settings of the present class are in it too.
_OF_CLASSES = ("eps", "eps1")
_KEEP = "keep the optimizer of the run, or start a new run from its weights with model.params.ckpt_path"

Settings = list[dict[str, Any]]  # per group of parameters


def settings_of(optimizer: Optimizer) -> Settings:
    """Return the parameter groups of `optimizer` without their parameters, with tensors of one number as numbers."""
    return [{key: number(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def number(value: Any) -> Any:
    """Return `value`, or its number if it is a tensor of one number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def use_settings(optimizer: Optimizer, made: Settings) -> None:
    """Give `optimizer`, which has loaded a state, the settings `made` that its config describes.

    A state dict brings the settings of the run that saved it, such as its weight decay. Values that the optimizer
    itself keeps in its groups, and the learning rates, stay.

    Raises:
        UserError: the state is of another class of optimizer, or lacks moments that a setting needs.
    """
    cls = type(getattr(optimizer, "inner", optimizer))  # InBackward wraps the optimizer that has the settings
    for group, own in zip(optimizer.param_groups, made, strict=True):
        for key, value in own.items():
            if key in _RATES:
                continue
            saved = group.get(key)
            refuse_if(
                key not in group and value is not None and not isinstance(value, bool),
                f"the checkpoint's optimizer has no {key}, as {cls.__name__} does; {_KEEP}",
            )
            if not takes(cls, key):
                _check_kind(key, saved, value)
            elif _plain(saved) != _plain(value):
                refuse_if(
                    key in _NEED_MOMENTS and not saved,
                    f"the checkpoint's optimizer has {key}={saved!r:.60}, not {value!r}; {_KEEP}",
                )
                if key not in _IMPLEMENTATION:
                    log.info("The optimizer's %s was %.60r in the checkpoint; it is %r now", key, saved, value)
                group[key] = value
        foreign = next((key for key in _OF_CLASSES if key in group and key not in own), None)
        refuse_if(
            foreign is not None, f"the checkpoint's optimizer has {foreign}, which {cls.__name__} does not; {_KEEP}"
        )
        if group.get("fused") or group.get("capturable"):
            _move_steps(optimizer, group["params"])


def check_state(optimizer: Optimizer) -> None:
    """Raise `UserError` unless the loaded moments of `optimizer` have the structure of new ones."""
    is_factored = type(getattr(optimizer, "inner", optimizer)).__name__ in _FACTORED
    kinds: dict[bool, Mapping[str, str]] = {}  # by whether the parameter's second moments are factored
    for parameter, moments in optimizer.state.items():
        found = {key: _kind(value) for key, value in moments.items()}
        if not found:
            continue
        expected = kinds.setdefault(is_factored and parameter.ndim > 1, found)
        if found != expected:
            raise UserError(
                f"the checkpoint's optimizer state holds {sorted(found)} for one parameter and {sorted(expected)} for "
                "another, or other types; the file may be damaged"
            )
        shapes = {parameter.shape, *(_means(parameter.shape) if is_factored else ())}
        for key, value in moments.items():
            if type(value) is Tensor and value.ndim and value.shape not in shapes and value.numel() > 1:
                raise UserError(
                    f"the checkpoint's optimizer state has {key} of shape {tuple(value.shape)} for a parameter of "
                    f"shape {tuple(parameter.shape)}; the file may be damaged"
                )


def _means(shape: Size) -> set[Size]:
    """Return the shapes of the means of the rows and of the columns, with and without a dimension of 1."""
    if len(shape) < 2:
        return set()
    *outer, rows, columns = shape
    return {Size([*outer, *last]) for last in ([rows], [columns], [rows, 1], [1, columns])}


def _check_kind(key: str, saved: Any, own: Any) -> None:
    """Raise `UserError` unless `saved`, which the optimizer keeps in a group, has the type of a new one."""
    saved = number(saved)
    refuse_if(
        type(saved) is not type(own) and not (_is_number(saved) and _is_number(own)),
        f"the checkpoint's optimizer has {key}={saved!r:.60} but the config's has {own!r}; the file may be damaged",
    )


def _move_steps(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Move the numbers of steps to the devices of `parameters`, where a fused optimizer reads them."""
    for parameter in parameters:
        step = optimizer.state.get(parameter, {}).get("step")
        if isinstance(step, Tensor) and step.device.type == "cpu" and parameter.device.type != "cpu":
            optimizer.state[parameter]["step"] = step.to(parameter.device)


def _plain(value: Any) -> Any:
    """Return a setting so that equal ones compare as equal: betas as a tuple, tensors as numbers."""
    return tuple(map(number, value)) if isinstance(value, list | tuple) else number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "tensor"
    return "number" if _is_number(value) else type(value).__name__
