"""Merging of configs. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.trust import may_look_up
from ldm.util import UserError, get_obj_from_str, takes


def merge_configs(config: DictConfig, part: DictConfig, trusted: bool = False) -> DictConfig:
    """Return a copy of `config`, updated with `part` by `update_config`."""
    merged = copy.deepcopy(config)
    update_config(merged, part, trusted)
    return merged


def update_config(config: DictConfig, part: DictConfig, trusted: bool = False) -> None:
    """Merge `part` into `config`, by the rules of OmegaConf.

    If `part` changes a `target`, the `params` that only the old class takes are dropped, such as the settings of
    another optimizer. For this, both classes are imported if `trusted` is true or they need no trust. Otherwise all
    `params` are kept.
    """
    for path in _dropped(OmegaConf.to_container(config), OmegaConf.to_container(part), trusted):
        node = config
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
    config.merge_with(part)


def _dropped(below: Any, above: Any, trusted: bool, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Remove from `below` the params that only replaced classes take, and yield their paths; see `update_config`."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return
    for key in _old_params(below, above, trusted):
        del below["params"][key]
        yield *path, "params", key
    for key in below.keys() & above.keys():
        yield from _dropped(below[key], above[key], trusted, (*path, key))


def _old_params(below: dict, above: dict, trusted: bool) -> list[str]:
    old, new, params = below.get("target"), above.get("target"), below.get("params")
    if old in (None, new) or new is None or not isinstance(params, dict):
        return []
    if not may_look_up(old, trusted) or not may_look_up(new, trusted):
        return []
    try:
        was, is_now = get_obj_from_str(old), get_obj_from_str(new)
    except UserError:  # reported later, by the trust check or when the object is built
        return []
    if not callable(was) or not callable(is_now):
        return []
    return [key for key in params if takes(was, key) and not takes(is_now, key)]
