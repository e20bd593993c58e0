"""The `${...}` of a config: which it may have, how large it becomes with them replaced, and which are replaced.

A hundred short lines can stand for 2¹⁰⁰, so the size is told before anything is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.util import UserError

# What can be followed without OmegaConf: `${model.params.x}`, `${.x}`, `${a[0]}`.
_REFERENCE = re.compile(r"\$\{(\.*)([^${}:\s]+)\}")
_NODE = 64  # what a value weighs beside a character
_MOST = 1 << 20

Path = tuple[str, ...]  # where a value is: the keys, and the positions in lists, from the top


def check_interpolations(config: Any, source: str, typed: Collection[Path] = ()) -> None:
    """Raise `UserError` unless `config`, plain dicts and lists, has only references to its own values that stay small.

    Anything else that `${...}` can do, such as reading the environment, needs trust. The values at the paths `typed`
    came from the command line, and are not held to that. `source` names the config in messages. A reference that leads
    nowhere or in circles is left to whoever resolves it.
    """
    if _Sizes(config, source, typed).of(()) > _MOST:
        raise UserError(f"{source}: its ${{...}} stand for too much; write the values out")


def typed_paths(parts: Collection[Any]) -> set[Path]:
    """The paths of the values in `parts`, plain dicts that were typed, except those that refer to other values."""
    return {path for part in parts for path, text in _leaves(part) if not _REFERENCE.search(text)}


def resolve_references(config: DictConfig) -> DictConfig:
    """Return `config` with its references to its own values replaced.

    A value that depends on a resolver, such as `${oc.env:NAME}`, stays as it is written: OmegaConf replaces it
    wherever it is read, and a file that is written from the config never holds it.

    Raises:
        OmegaConfBaseException: a reference leads nowhere or in circles, or a resolver fails.
    """
    written, resolved = OmegaConf.to_container(config), OmegaConf.to_container(config, resolve=True)
    return OmegaConf.create(_Depends(written).with_values(resolved, (), written))


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Each scalar in `value` as text, with its path."""
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
    """The path that the reference `${<dots><name>}` at `path` leads to."""
    base = path[: -len(dots)] if dots else ()
    return (*base, *(part for part in re.split(r"[.\[\]]+", name) if part))


def _is_ambiguous(value: dict[Any, Any]) -> bool:
    """Whether two keys, such as 1 and "1", are one in a path."""
    return len(set(map(str, value))) < len(value)


class _Sizes:
    """Characters and nodes of each value, its references replaced."""

    def __init__(self, config: Any, source: str, typed: Collection[Path]) -> None:
        self.config = config
        self.source = source
        self.typed = typed
        self.known: dict[Path, int] = {}

    def of(self, path: Path) -> int:
        if path not in self.known:
            self.known[path] = 0  # a reference back to here is a circle
            self.known[path] = _NODE + self._inside(path)
        return self.known[path]

    def _inside(self, path: Path) -> int:
        value = _at(self.config, path)
        if isinstance(value, dict):
            if _is_ambiguous(value):
                raise UserError(f"{self.source}: {'.'.join(path)!r:.100} has a key twice, as text and as a number")
            return sum(len(str(key)) + self.of((*path, str(key))) for key in value)
        if isinstance(value, list):
            return sum(self.of((*path, str(number))) for number in range(len(value)))
        if not isinstance(value, str):
            return 0
        if "${" in _REFERENCE.sub("", value) and path not in self.typed:
            raise UserError(
                f"{self.source}: {value!r:.100}: only ${{path.to.a.value}} is replaced in a config that is not "
                "trusted; write the value out, or give --trust-config if you trust whoever wrote the config"
            )
        return len(value) + sum(self.of(_target(path, *found)) for found in _REFERENCE.findall(value))


class _Depends:
    """Which values of a config depend on a resolver."""

    def __init__(self, written: Any) -> None:
        self.written = written
        self.known: dict[Path, bool] = {}

    def with_values(self, resolved: Any, path: Path, written: Any) -> Any:
        """`resolved`, the values at `path`, except that what depends on a resolver is as it is `written`."""
        if isinstance(written, dict):
            if _is_ambiguous(written):
                return written
            return {key: self.with_values(resolved[key], (*path, str(key)), part) for key, part in written.items()}
        if isinstance(written, list):
            parts = enumerate(zip(resolved, written, strict=True))
            return [self.with_values(value, (*path, str(number)), part) for number, (value, part) in parts]
        is_made_of_parts = isinstance(resolved, str) and "${" in resolved  # and would be replaced once more
        return written if is_made_of_parts or self.depends(path) else resolved

    def depends(self, path: Path) -> bool:
        if path not in self.known:
            self.known[path] = False  # a reference back to here adds nothing
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
