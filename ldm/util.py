"""Building objects from `target:` / `params:` configs, and the one exception that users see. Imports no torch."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.translations import instead, instead_of_key, todays_path

logger = logging.getLogger(__name__)

# Annotations that a value is checked against, and what to give.
_CHECKED_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "int | None": ((int, type(None)), "a whole number or null"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float, type(None)), "a number or null"),
}
# The third is the trainer's, in a model's config; the last stands beside `target` in some published configs.
_CONFIG_KEYS = ("target", "params", "base_learning_rate", "ckpt_path")
# Config values that stand for "nothing to build": the model fills the place itself.
_MARKERS = ("__is_first_stage__", "__is_unconditional__")


class UserError(ValueError):
    """Bad input from a person: its message is one line that names the file, key or value and what to do."""


def nearest(name: str, valid: Mapping[str, Any] | list[str] | set[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, or the sorted list of valid names."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.65)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(sorted(valid)) or 'none'}"


def check_at_least_one(**numbers: int) -> None:
    """Raise `UserError` for the first of the named `numbers` that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} {number}: give at least 1")


def get_obj_from_str(path: str) -> Any:
    """The object that the dotted `path` names, such as `"torch.nn.Linear"`; see `ldm.translations` for what moved.

    Raises:
        UserError: `path` is no dotted path, or the module or the attribute does not exist.
    """
    if not isinstance(path, str) or "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"target {path!r} is not a dotted path such as 'package.module.Class'{instead(str(path))}")
    module_name, _, attribute = todays_path(path).rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"target {path!r}: no module named {error.name!r}{instead(path)}") from error
    if not hasattr(module, attribute):
        public = [name for name in dir(module) if not name.startswith("_")]
        hint = instead(path) or nearest(attribute, public)
        raise UserError(f"target {path!r}: module {module_name!r} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """What `target` takes by name, and whether it takes any other name too."""
    initialisers = [target]
    if inspect.isclass(target):
        initialisers = [cls.__dict__["__init__"] for cls in target.__mro__ if "__init__" in cls.__dict__]
    named: dict[str, inspect.Parameter] = {}
    for function in initialisers:
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # a C function without a signature
            return named, True
        keywords = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        keywords.pop("self", None)
        named = keywords | named  # a class's own word counts more than that of the class that it inherits from
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return named, False
    return named, True


def takes(target: Callable[..., Any], name: str) -> bool:
    """Whether `target` takes a parameter of that name."""
    named, takes_any = _parameters(target)
    return name in named or takes_any


def check_params(path: str, target: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first of `params` that `target` (named `path` in the config) does not take.

    Names are checked, and values where the signature asks for a bool (which any string would pass for), int or float.
    """
    named, takes_any = _parameters(target)
    for key, value in params.items():
        if key not in named:
            if takes_any:
                continue
            hint = instead_of_key(key) or nearest(key, set(named))
            raise UserError(f"unknown key {key!r} in params of {path}{hint}")
        annotation = named[key].annotation  # a string where the module defers annotations
        expected = _CHECKED_TYPES.get(
            annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        )
        if expected and not isinstance(value, expected[0]):
            raise UserError(f"{key}={value!r} in params of {path}: give {expected[1]}")


def instantiate_from_config(config: Mapping[str, Any] | str | None, **overrides: Any) -> Any:
    """Call `config["target"]` with `config["params"]`, updated by `overrides`.

    The markers `__is_first_stage__` and `__is_unconditional__` give None. A `ckpt_path` beside `target` counts as one
    in `params` if there is such a file: published configs name files there that the whole model's checkpoint replaces.

    Raises:
        UserError: no `target`, a target that does not exist, or a key or value in `params` that it does not take.
    """
    if config in _MARKERS:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"expected a mapping with the key 'target' (and 'params'), got {config!r}")
    for key in config:
        if key not in _CONFIG_KEYS:
            raise UserError(f"unknown key {key!r} beside target {config['target']!r}{nearest(key, set(_CONFIG_KEYS))}")
    target = get_obj_from_str(config["target"])
    params = {**(config.get("params") or {}), **overrides}
    check_params(config["target"], target, params)
    beside = config.get("ckpt_path")
    if beside is not None and "ckpt_path" not in params:
        if takes(target, "ckpt_path") and Path(beside).is_file():
            params["ckpt_path"] = beside
        else:
            why = "there is no such file" if takes(target, "ckpt_path") else "this class loads none"
            logger.warning("%s: ckpt_path %s beside target is not loaded: %s", config["target"], beside, why)
    try:
        return target(**params)
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:  # the last, of sizes below 0
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{config['target']}: {reason}") from error
