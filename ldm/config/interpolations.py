"""How large a config becomes when its `${...}` are replaced, told beforehand: 100 short lines can stand for 2¹⁰⁰."""

from __future__ import annotations

import re
from typing import Any

from ldm.util import UserError

# What can be followed without OmegaConf: `${model.params.x}`, `${.x}`, `${a[0]}`; and what stands for itself.
_REFERENCE = re.compile(r"\$\{(\.*)([^${}:\s]+)\}")
_ENVIRONMENT = re.compile(r"\$\{oc\.env:[^${}]*\}")
_NODE = 64  # what a value weighs beside a character
_MOST = 1 << 20

Path = tuple[str, ...]


def check_interpolations(config: Any, source: str) -> None:
    """Raise `UserError` unless `config`, plain dicts and lists, has only `${...}` that can be followed and stay small.

    `source` names it in messages. What leads nowhere or in circles is left to whoever resolves it.
    """
    if _Sizes(config, source).of(()) > _MOST:
        raise UserError(f"{source}: its ${{...}} stand for too much; write the values out")


class _Sizes:
    """Characters and nodes of each value, its references replaced."""

    def __init__(self, config: Any, source: str) -> None:
        self.config = config
        self.source = source
        self.known: dict[Path, int] = {}

    def of(self, path: Path) -> int:
        if path not in self.known:
            self.known[path] = 0  # a reference back to here is a circle
            self.known[path] = _NODE + self._inside(path)
        return self.known[path]

    def _inside(self, path: Path) -> int:
        value = self._at(path)
        if isinstance(value, dict):
            return sum(len(str(key)) + self.of((*path, str(key))) for key in value)
        if isinstance(value, list):
            return sum(self.of((*path, str(number))) for number in range(len(value)))
        if not isinstance(value, str):
            return 0
        if "${" in _REFERENCE.sub("", _ENVIRONMENT.sub("", value)):
            raise UserError(
                f"{self.source}: {value!r:.100}: only ${{path.to.a.value}} and ${{oc.env:NAME}} are replaced; "
                "write the value out, or give --trust-config if you trust whoever wrote the config"
            )
        return len(value) + sum(self.of(self._target(path, *found)) for found in _REFERENCE.findall(value))

    @staticmethod
    def _target(path: Path, dots: str, name: str) -> Path:
        base = path[: -len(dots)] if dots else ()
        return (*base, *(part for part in re.split(r"[.\[\]]+", name) if part))

    def _at(self, path: Path) -> Any:
        value = self.config
        for part in path:
            if isinstance(value, dict):
                value = next((found for key, found in value.items() if str(key) == part), None)
            elif isinstance(value, list):
                value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
            else:
                return None
        return value
