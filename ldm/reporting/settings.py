"""Settings of a run, and their differences from a shipped config or from another run. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.load import SECTIONS, find_config, read_config
from ldm.config.merge import merge_configs
from ldm.util import UserError

_SHIPPED = Path(__file__).resolve().parents[2] / "configs/latent-diffusion"
_DEFAULTS = {"lightning.scale_lr": True}  # values that every run saves
_ABSENT = "–"


class Difference(NamedTuple):
    """Setting whose values differ, one value per config."""

    key: str
    values: list[str]


class RunSettings(NamedTuple):
    """Merged config of a run, the shipped configs nearest to it, and the values `[shipped, run]` that differ."""

    config: dict[str, Any]
    base: list[str]
    differences: list[Difference]


def read_settings(configs: Sequence[Path], given: Sequence[str], problems: list[str]) -> RunSettings:
    """Merge the saved `configs` of a run, oldest first, and compare them with the shipped configs among `given`.

    If a name in `given`, the run's `--base`, is not that of a shipped config, the nearest shipped config is taken.
    References and values from the environment are kept as text.
    """
    config = merged_config(configs, problems)
    if not config:
        return RunSettings({}, [], [])
    base = [Path(name).name for name in given]
    is_shipped = base and all((_SHIPPED / name).is_file() for name in base)
    if not is_shipped:
        base = [name] if (name := _nearest(config)) else []
    shipped = merged_config([find_config(_SHIPPED / name) for name in base], problems)
    return RunSettings(config, base, differences([{**_DEFAULTS, **flat(shipped)}, flat(config)]) if base else [])


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by their dotted paths. Lists are values."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return the settings in which flat `configs` differ, in the order of their keys."""
    keys = sorted({key for config in configs for key in config})
    rows = [Difference(key, [_shown(config, key) for config in configs]) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _shown(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return _ABSENT
    value = config[key]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def merged_config(paths: Sequence[Path], problems: list[str]) -> dict[str, Any]:
    """Merge the configs at `paths` from left to right. A damaged one is left out, with a line in `problems`.

    Sections that are no mappings are left out.
    """
    config = OmegaConf.create()
    for path in paths:
        try:
            config = merge_configs(config, read_config(path))
        except (UserError, OmegaConfBaseException, TypeError, OSError) as error:
            problems.append(str(error).splitlines()[0])
    sections = OmegaConf.to_container(config)
    return {name: sections[name] for name in sections if name in SECTIONS and isinstance(sections[name], dict)}


def params_of(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """Return the `params` of a section of `config`, empty if there are none."""
    params = config.get(section, {}).get("params")
    return params if isinstance(params, dict) else {}


def _nearest(config: Mapping[str, Any]) -> str | None:
    """Return the name of the shipped training config with the fewest settings that differ."""
    own = flat(config)
    ranked = sorted((_distance(own, shipped), name) for name, shipped in _shipped())
    return ranked[0][1] if ranked else None


@functools.cache  # of 14 files, whose parsing takes half a second
def _shipped() -> list[tuple[str, dict[str, Any]]]:
    """Return the flat shipped training configs with their names."""
    found = []
    for path in sorted(_SHIPPED.glob("*.yaml")):
        content = OmegaConf.to_container(read_config(path))
        if (content.get("model") or {}).get("target") and content.get("data"):
            found.append((path.name, flat(content)))
    return found


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return sum(_shown(one, key) != _shown(other, key) for key in one.keys() | other.keys())
