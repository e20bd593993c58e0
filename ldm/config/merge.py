"""Merging of configs. Imports no torch."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.trust import may_look_up
from ldm.util import UserError, get_obj_from_str, takes


def merge_configs(config: DictConfig, part: DictConfig, trusted: bool = False) -> DictConfig:
    """Return `config` updated with `part`, by the rules of OmegaConf.

    If `part` changes a `target`, the `params` that only the old class takes are dropped, such as the settings of
    another optimizer. For this, both classes are imported if `trusted` is true or they need no trust. Otherwise all
    `params` are kept.
    """
    below = OmegaConf.to_container(config)
    _drop_old_params(below, OmegaConf.to_container(part), trusted)
    return OmegaConf.merge(OmegaConf.create(below), part)


def _drop_old_params(below: Any, above: Any, trusted: bool) -> None:
    """Remove from `below` the params that only its replaced classes take; see `merge_configs`."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return
    for key in _old_params(below, above, trusted):
        del below["params"][key]
    for key in below.keys() & above.keys():
        _drop_old_params(below[key], above[key], trusted)


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
