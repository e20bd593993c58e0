"""Building objects from `target:` / `params:` configs, and the one exception that users see. Imports no torch."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

# Config values that stand for "nothing to build": the model fills the place itself.
_MARKERS = ("__is_first_stage__", "__is_unconditional__")


class UserError(ValueError):
    """Bad input from a person: its message is one line that names the file, key or value and what to do."""


def nearest(name: str, valid: Mapping[str, Any] | list[str] | set[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, or the sorted list of valid names."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(sorted(valid)) or 'none'}"


def get_obj_from_str(path: str) -> Any:
    """The object that the dotted `path` names, such as `"torch.nn.Linear"`.

    Raises:
        UserError: `path` has no module part, or the module or the attribute does not exist.
    """
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UserError(f"target {path!r} is not a dotted path such as 'package.module.Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"target {path!r}: no module named {error.name!r}") from error
    if not hasattr(module, attribute):
        public = [name for name in dir(module) if not name.startswith("_")]
        raise UserError(f"target {path!r}: module {module_name!r} has no {attribute!r}{nearest(attribute, public)}")
    return getattr(module, attribute)


def valid_params(target: Callable[..., Any]) -> set[str] | None:
    """The keyword names that `target` takes, or None when it takes any.

    A class whose `__init__` passes `**kwargs` on is read together with the classes that it inherits from.
    """
    initialisers = [target]
    if inspect.isclass(target):
        initialisers = [cls.__dict__["__init__"] for cls in target.__mro__ if "__init__" in cls.__dict__]
    names: set[str] = set()
    for function in initialisers:
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # a C function without a signature
            return None
        names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return None


def check_params(path: str, target: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first key of `params` that `target` (named `path` in the config) does not take."""
    valid = valid_params(target)
    if valid is None:
        return
    for key in params:
        if key not in valid:
            raise UserError(f"unknown key {key!r} in params of {path}{nearest(key, valid)}")


def instantiate_from_config(config: Mapping[str, Any] | str | None, **overrides: Any) -> Any:
    """Call `config["target"]` with `config["params"]`, updated by `overrides`.

    The markers `__is_first_stage__` and `__is_unconditional__` give None.

    Raises:
        UserError: no `target`, a target that does not exist, or a key in `params` that the target does not take.
    """
    if config in _MARKERS:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"expected a mapping with the key 'target' (and 'params'), got {config!r}")
    for key in config:
        if key not in ("target", "params"):
            raise UserError(
                f"unknown key {key!r} beside target {config['target']!r}{nearest(key, ['target', 'params'])}"
            )
    target = get_obj_from_str(config["target"])
    params = {**(config.get("params") or {}), **overrides}
    check_params(config["target"], target, params)
    return target(**params)
