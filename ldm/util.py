"""Building of objects from `target:` / `params:` configs, checks of values, and `UserError`. Imports no torch."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.moved_targets import current_path, hint_for_key, hint_for_missing_module, hint_for_target, without_unused_keys
from ldm.printable import printable

logger = logging.getLogger(__name__)

# Checked annotations: the types of their values, and a description for messages.
_CHECKED_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "bool | None": ((bool, type(None)), "true or false or null"),
    "int": ((int,), "a whole number"),
    "int | None": ((int, type(None)), "a whole number or null"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float, type(None)), "a number or null"),
    "str": ((str,), "a text"),
    "str | None": ((str, type(None)), "a text or null"),
    "Mapping[str, Any]": ((Mapping,), "a mapping"),
    "Mapping[str, Any] | None": ((Mapping, type(None)), "a mapping or null"),
}
_TOO_LARGE = 1 << 63  # torch takes smaller whole numbers
# Annotations of checked lists, without `| None`: the type of their parts, and a description for messages.
_CHECKED_LISTS: dict[str, tuple[tuple[type, ...], str]] = {
    "Sequence[int]": ((int,), "whole numbers"),
    "Sequence[float]": ((int, float), "numbers"),
    "Sequence[str]": ((str,), "texts"),
}
# `base_learning_rate` is for the trainer. Some published configs have `ckpt_path` beside `target`.
_CONFIG_KEYS = ("target", "params", "base_learning_rate", "ckpt_path")
# Config values for which nothing is built; the model handles them.
_MARKERS = ("__is_first_stage__", "__is_unconditional__")


class UserError(ValueError):
    """Error in user input. The message is one line that names the file, key or value and the remedy.

    The message may contain unescaped names from files, and secrets. `str` escapes control characters and line ends, and
    hides the secrets.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


@contextmanager
def located(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Add the file, key or option `where`, and a colon, to the start of each `UserError`.

    Exceptions of `kinds` become such a `UserError` too.
    """
    try:
        yield
    except (UserError, *kinds) as error:
        raise UserError(f"{where}: {error}") from error


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the valid name closest to `name`, or else the sorted valid names."""
    valid = list(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.65)  # a key in YAML may be a number
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
    """Raise `UserError` unless `value` is a finite number within the limits. `name` is the key or option.

    Args:
        least, most: inclusive limits; None for no limit.
        above: exclusive lower limit; None for no limit.
        whole: require a whole number.
        optional: accept None.
        unit: unit of the number for the message.
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
        f"above {above}, up to {most}": above is not None and most is not None,
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


def refuse_if(condition: Any, message: str) -> None:
    """Raise `UserError` with `message` if `condition` is true. `message` is formatted in either case: keep it cheap."""
    if condition:
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
    """Return the object at the dotted `path`, such as `"torch.nn.Linear"`. Moved paths are translated.

    Raises:
        UserError: `path` is not a dotted path, or the module or the attribute does not exist.
    """
    if not isinstance(path, str) or "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise UserError(
            f"target {path!r} is not a dotted path such as 'package.module.Class'{hint_for_target(str(path))}"
        )
    module_name, _, attribute = current_path(path).rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"target {path!r}: no module named {error.name!r}{hint_for_missing_module(path)}") from error
    if not hasattr(module, attribute):
        public = [name for name in dir(module) if not name.startswith("_")]
        hint = hint_for_target(path) or nearest(attribute, public)
        raise UserError(f"target {path!r}: module {module_name!r} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of `target` by name, and whether it takes any other keyword."""
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
        named = keywords | named  # a subclass takes precedence over its base
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return named, False
    return named, True


def takes(target: Callable[..., Any], name: str) -> bool:
    """Return True if `target` takes the parameter `name`."""
    named, takes_any = _parameters(target)
    return name in named or takes_any


def _as_text(annotation: Any) -> str:
    """Return an annotation as text: `Optional[int]` and a deferred `"int | None"` become `int | None`."""
    if isinstance(annotation, str):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = typing.get_args(annotation)
        names = [_as_text(part) for part in parts if part is not type(None)]
        return " | ".join([*names, "None"] if len(names) < len(parts) else names)
    return "" if typing.get_origin(annotation) else getattr(annotation, "__name__", "")


def check_params(path: str, target: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first of `params` that `target`, at `path` in the config, does not take.

    Names are checked, and values for parameters with the annotation bool, int, float, str, mapping, or sequence of int,
    float or str.
    """
    named, takes_any = _parameters(target)
    for key, value in params.items():
        if key not in named:
            if takes_any:
                continue
            hint = hint_for_key(key) or nearest(key, set(named))
            raise UserError(f"unknown key {key!r} in params of {path}{hint}")
        if value is None and named[key].default is None:
            continue
        annotation = _as_text(named[key].annotation)
        expected = _CHECKED_TYPES.get(annotation)
        if expected and not isinstance(value, expected[0]):
            raise UserError(f"{key}={value!r} in params of {path}: give {expected[1]}")
        if expected and isinstance(value, float) and math.isnan(value):
            raise UserError(f"{key}={value!r} in params of {path}: is not a number; give {expected[1]}")
        if expected and isinstance(value, int) and abs(value) >= _TOO_LARGE:
            raise UserError(f"{key} in params of {path}: the number is too large; give one below 2^63")
        if annotation.removesuffix(" | None") in _CHECKED_LISTS:
            kinds, parts = _CHECKED_LISTS[annotation.removesuffix(" | None")]
            if not _is_list_of(kinds, value, annotation):
                raise UserError(f"{key}={value!r} in params of {path}: give a list of {parts}")


def _is_list_of(kinds: tuple[type, ...], value: Any, annotation: str) -> bool:
    if value is None:
        return annotation.endswith("| None")
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(part, kinds) and not isinstance(part, bool) for part in value)


def instantiate_from_config(config: Mapping[str, Any] | str | None, **overrides: Any) -> Any:
    """Call `config["target"]` with `config["params"]`, updated by `overrides`.

    The result is None for the markers `__is_first_stage__` and `__is_unconditional__`. A `ckpt_path` beside `target` is
    used like one in `params` if the file exists. In published configs it often does not exist, and the checkpoint of
    the whole model has these weights.

    Raises:
        UserError: `target` is missing or unknown, or it does not take a key or value of `params`.
    """
    if config in _MARKERS:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        keys = isinstance(config, Mapping) and ", ".join(map(str, config))
        given = f"the keys {keys}" if keys else repr(config)
        raise UserError(f"expected a mapping with the key 'target' (and 'params'), got {given:.200}")
    for key in config:
        if key not in _CONFIG_KEYS:
            raise UserError(f"unknown key {key!r} beside target {config['target']!r}{nearest(key, set(_CONFIG_KEYS))}")
    target = get_obj_from_str(config["target"])
    given = config.get("params") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"params {given!r:.100} of {config['target']}: give a mapping")
    params, unused = without_unused_keys(config["target"], {**given, **overrides})
    for key in unused:
        logger.warning("%s: %s is ignored, because nothing here uses it%s", config["target"], key, hint_for_key(key))
    check_params(config["target"], target, params)
    beside = config.get("ckpt_path")
    if beside is not None and "ckpt_path" not in params:
        if takes(target, "ckpt_path") and Path(beside).is_file():
            params["ckpt_path"] = beside
        else:
            why = "the file does not exist" if takes(target, "ckpt_path") else "this class takes no ckpt_path"
            logger.warning(
                "%s: the ckpt_path %s beside target is not loaded, because %s", config["target"], beside, why
            )
    try:
        return target(**params)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{config['target']}: {reason}") from error
