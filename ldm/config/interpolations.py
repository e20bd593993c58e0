"""Interpolations `${...}` in configs: permitted forms, size after replacement, and replacement.

A hundred short lines can expand to 2¹⁰⁰ values. The size is therefore computed before any replacement.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.util import UserError, refuse_if

# References to a value of the config: `${model.params.x}`, `${.x}`, `${a[0]}`.
_REFERENCE = re.compile(r"\$\{(\.*)([^${}:\s]+)\}")
# Values of the environment. On the command line, they are the user's own; any other `${...}` may refer to a file.
_ENVIRONMENT = re.compile(r"\$\{oc\.(?:env|decode):[^${}]*\}")
_NODE = 64  # size of a value in characters, in addition to its text
_MOST = 1 << 20

Path = tuple[str, ...]  # location of a value: keys and list indices from the top


def check_interpolations(config: Any, source: str, typed: Collection[Path] = ()) -> None:
    """Raise `UserError` unless all interpolations in `config` are references to its own values, of limited size.

    Other interpolations, such as those of the environment, need trust. `config` consists of plain dicts and lists.
    Values at the paths `typed` come from the command line and are not checked. `source` names the config in messages.
    Missing and circular references are errors of the resolution, not of this check.
    """
    refuse_if(
        _Sizes(config, source, typed).of(()) > _MOST,
        f"{source}: its ${{...}} expand to too many values; write the values out",
    )


def typed_paths(parts: Collection[Any]) -> set[Path]:
    """Return the paths of the values in the command-line `parts`, except for values that may refer to a file."""
    return {path for part in parts for path, text in _leaves(part) if not _may_refer(text)}


def resolve_references(config: DictConfig) -> DictConfig:
    """Return `config` with references to its own values replaced.

    A value that depends on a resolver, such as `${oc.env:NAME}`, is kept as text. OmegaConf replaces it on access, so
    that it never appears in a file written from the config.

    Raises:
        OmegaConfBaseException: a reference is missing or circular, or a resolver fails.
    """
    written, resolved = OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True)
    return OmegaConf.create(_ResolverUse(written).with_values(resolved, (), written))


def _may_refer(text: str) -> bool:
    """Return True if `text` has an interpolation that is not of the environment alone, such as `${ a }`."""
    found = 1
    while found:
        text, found = _ENVIRONMENT.subn("", text)
    return "${" in text


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Yield path and text of each scalar in `value`."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, (*path, str(key)))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _leaves(part, (*path, str(number)))
    else:
        yield path, str(value)


def _at(value: Any, path: Path) -> Any:
    for part in path:
        if isinstance(value, dict):
            value = next((found for key, found in value.items() if str(key) == part), None)
        elif isinstance(value, list):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        else:
            return None
    return value


def _target(path: Path, dots: str, name: str) -> Path:
    """Return the path that the reference `${<dots><name>}` at `path` refers to."""
    base = path[: -len(dots)] if dots else ()
    return (*base, *(part for part in re.split(r"[.\[\]]+", name) if part))


def _is_ambiguous(value: dict[Any, Any]) -> bool:
    """Return True if two keys, such as 1 and "1", have the same text."""
    return len(set(map(str, value))) < len(value)


class _Sizes:
    """Size of each value with its references replaced, in characters."""

    def __init__(self, config: Any, source: str, typed: Collection[Path]) -> None:
        self.config = config
        self.source = source
        self.typed = typed
        self.known: dict[Path, int] = {}

    def of(self, path: Path) -> int:
        if path not in self.known:
            self.known[path] = 0  # ends a circular reference
            self.known[path] = _NODE + self._inside(path)
        return self.known[path]

    def _inside(self, path: Path) -> int:
        value = _at(self.config, path)
        if isinstance(value, dict):
            if _is_ambiguous(value):
                raise UserError(
                    f"{self.source}: {'.'.join(path)!r:.100} has the same key as text and as a number; remove one"
                )
            return sum(len(str(key)) + self.of((*path, str(key))) for key in value)
        if isinstance(value, list):
            return sum(self.of((*path, str(number))) for number in range(len(value)))
        if not isinstance(value, str):
            return 0
        refuse_if(
            "${" in _REFERENCE.sub("", value) and path not in self.typed,
            f"{self.source}: {value!r:.100}: an untrusted config may only use ${{path.to.a.value}}; "
            "write the value out, or give --trust-config if you trust the author of the config",
        )
        return len(value) + sum(self.of(_target(path, *found)) for found in _REFERENCE.findall(value))


class _ResolverUse:
    """Search for values of a config that depend on a resolver."""

    def __init__(self, written: Any) -> None:
        self.written = written
        self.known: dict[Path, bool] = {}

    def with_values(self, resolved: Any, path: Path, written: Any) -> Any:
        """Return the values at `path`: `written` where they depend on a resolver, else `resolved`."""
        if isinstance(written, dict):
            if _is_ambiguous(written):
                return written
            return {key: self.with_values(resolved[key], (*path, str(key)), part) for key, part in written.items()}
        if isinstance(written, list):
            parts = enumerate(zip(resolved, written, strict=True))
            return [self.with_values(value, (*path, str(number)), part) for number, (value, part) in parts]
        is_made_of_parts = isinstance(resolved, str) and "${" in resolved  # would be replaced again
        return written if is_made_of_parts or self.depends(path) else resolved

    def depends(self, path: Path) -> bool:
        if path not in self.known:
            self.known[path] = False  # ends a circular reference
            self.known[path] = self._inside(path)
        return self.known[path]

    def _inside(self, path: Path) -> bool:
        value = _at(self.written, path)
        if isinstance(value, dict):
            return any(self.depends((*path, str(key))) for key in value)
        if isinstance(value, list):
            return any(self.depends((*path, str(number))) for number in range(len(value)))
        if not isinstance(value, str) or "${" not in value:
            return False
        if "${" in _REFERENCE.sub("", value):
            return True
        return any(self.depends(_target(path, *found)) for found in _REFERENCE.findall(value))
