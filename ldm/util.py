"""Building objects from `target:` / `params:` configs, and the one exception that users see. Imports no torch."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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


# Characters that move the cursor, colour the screen, end a line or reverse the order of letters; and half characters,
# which stand for bytes of file names that are not text, and cannot be printed.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def escaped(text: str, keep: str = "") -> str:
    """Return `text` with its control characters as Python writes them, `\\x1b`, except those in `keep`."""

    def written(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else repr(found[0])[1:-1]

    return _UNPRINTABLE.sub(written, text)


class UserError(ValueError):
    """Bad input from a person: its message is one line that names the file, key or value and what to do.

    The message may hold names from files as they are: `str` escapes control characters and line ends.
    """

    def __str__(self) -> str:
        return escaped(super().__str__())


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the valid name closest to `name`, or the sorted list of valid names."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.65)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(sorted(valid)) or 'none'}"


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    whole: bool = True,
    optional: bool = False,
    unit: str = "",
) -> None:
    """Raise `UserError` unless `value` is a finite number within the limits; `name` says whose value it is.

    Args:
        least, above, most: limits, of which `above` itself is not in the range; None for no limit.
        whole: ask for a whole number.
        optional: take None too.
        unit: what the number counts, for the message.
    """
    if value is None and optional:
        return
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    in_range = is_number and (
        (isinstance(value, int) or math.isfinite(value))
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )
    if in_range:
        return
    limits = {
        f"from {least} to {most}": least is not None and most is not None,
        f"of at least {least}": least is not None,
        f"above {above}": above is not None,
    }
    kind = "a whole number" if whole else "a number" if any(limits.values()) else "a finite number"
    parts = [kind, f"of {unit}" if unit else "", next((text for text, known in limits.items() if known), "")]
    nothing = ", or leave it out" if name.startswith("--") else ", or null"
    raise UserError(f"{name} {value!r}: give {' '.join(filter(None, parts))}{nothing if optional else ''}")


def check_choice(name: str, value: Any, valid: Sequence[Any]) -> None:
    """Raise `UserError` unless `value` is one of `valid`. `name` is the key or option that has the value."""
    if value not in list(valid):
        raise UserError(f"{name} {value!r} is unknown{nearest(str(value), list(map(str, valid)))}")


def check_keys(name: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise `UserError` for the first of the keys `given` that is not in `valid`. `name` names the mapping."""
    valid = list(valid)
    unknown = next((key for key in given if key not in valid), None)
    if unknown is not None:
        raise UserError(f"unknown key {unknown!r} in {name}{nearest(unknown, valid)}")


def refuse_if(*faults: tuple[Any, str]) -> None:
    """Raise `UserError` with the message of the first of `faults` whose condition is true."""
    message = next((message for condition, message in faults if condition), None)
    if message is not None:
        raise UserError(message)


def entry_of(batch: Mapping[str, Any], key: str, name: str) -> Any:
    """Return `batch[key]`. `name` is the setting that has the value `key`.

    Raises:
        UserError: the batch has no such entry.
    """
    if key not in batch:
        raise UserError(f"{name} {key!r} is not in the batch, which has {', '.join(map(str, batch))}")
    return batch[key]


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
