"""Optimizer and schedule built from their `target` and `params`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ldm.util import UserError, instantiate_from_config


def build_optimizer(config: Mapping[str, Any], parameters: Iterable[nn.Parameter], lr: float, where: str) -> Optimizer:
    """Return the optimizer of `parameters` from `config`, a mapping of `target` and `params`.

    An `lr` in `params` takes precedence over `lr`. `where` is the config key for messages.

    Raises:
        UserError: the target does not exist or does not take its `params`, or a checkpoint cannot hold its state.
    """
    try:
        if str(config.get("target")).startswith("torchao."):
            raise UserError(
                f"{config['target']}: a checkpoint cannot hold its state; use ldm.optim.low_bit.AdamW8bit or "
                "AdamW4bit instead"
            )
        own_lr = (config.get("params") or {}).get("lr", lr)
        return instantiate_from_config(config, params=list(parameters), lr=own_lr)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def build_schedule(config: Mapping[str, Any]) -> Callable[[int], float]:
    """Build the multiplier of the learning rate, by step, that `config`, a `target` and `params`, describes.

    Raises:
        UserError: the target does not exist, does not take its `params`, or is no multiplier.
    """
    try:
        multiplier = instantiate_from_config(config)
    except UserError as error:
        raise UserError(f"scheduler_config: {error}") from error
    schedule = getattr(multiplier, "schedule", None)
    if schedule is None:
        raise UserError(f"scheduler_config: {config['target']} is no multiplier; name a class of ldm.lr_scheduler")
    return schedule
