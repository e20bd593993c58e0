"""Laying one config over another. Imports no torch."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.trust import may_look_up
from ldm.util import UserError, get_obj_from_str, takes


def laid_over(config: DictConfig, part: DictConfig, trusted: bool = False) -> DictConfig:
    """Return `config` with `part` over it, merged as OmegaConf does, so that `part` need only say what it changes.

    Where `part` names another class as a `target`, the `params` of `config` that the old class takes and the new one
    does not are left out: one optimizer's settings mean nothing to another. Both classes are looked up, which imports
    them, if they are `trusted` or need no trust. Otherwise all `params` stay.
    """
    below = OmegaConf.to_container(config)
    _leave_behind(below, OmegaConf.to_container(part), trusted)
    return OmegaConf.merge(OmegaConf.create(below), part)


def _leave_behind(below: Any, above: Any, trusted: bool) -> None:
    """Remove from `below` the params that make no sense under the classes of `above`."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return
    for key in _strangers(below, above, trusted):
        del below["params"][key]
    for key in below.keys() & above.keys():
        _leave_behind(below[key], above[key], trusted)


def _strangers(below: dict, above: dict, trusted: bool) -> list[str]:
    old, new, params = below.get("target"), above.get("target"), below.get("params")
    if old in (None, new) or new is None or not isinstance(params, dict):
        return []
    if not may_look_up(old, trusted) or not may_look_up(new, trusted):
        return []
    try:
        was, is_now = get_obj_from_str(old), get_obj_from_str(new)
    except UserError:  # said of the config as a whole, or by whoever builds from it
        return []
    if not callable(was) or not callable(is_now):
        return []
    return [key for key in params if takes(was, key) and not takes(is_now, key)]
