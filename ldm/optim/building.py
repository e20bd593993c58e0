"""Optimizer built from its `target` and `params`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ldm.util import UserError, instantiate_from_config, located, refuse_if

log = logging.getLogger(__name__)

_PRODIGY_RATE = 0.01  # of Prodigy, below which `lr` was probably meant for another optimizer


def build_optimizer(
    config: Mapping[str, Any],
    parameters: Iterable[nn.Parameter],
    lr: float,
    where: str,
    factors: Mapping[nn.Parameter, float] | None = None,
) -> Optimizer:
    """Return the optimizer of `parameters` from `config`, a mapping of `target` and `params`.

    An `lr` in `params` that is not null takes precedence over `lr`. `where` is the config key for messages. `factors`
    are those of the learning rate, for parameters that have one. Each factor has a group in the optimizer.

    Raises:
        UserError: the target does not exist or does not take its `params`, or a run cannot use it.
    """
    with located(where):
        refuse_if(
            str(config.get("target")).startswith("torchao."),
            f"{config.get('target')}: a checkpoint cannot hold its state; use ldm.optim.low_bit.AdamW8bit or "
            "AdamW4bit instead",
        )
        own_lr = (config.get("params") or {}).get("lr")
        rate = lr if own_lr is None else own_lr
        if "defaults" in (config.get("params") or {}):  # of a base class, and some classes ignore it
            raise UserError(f"unknown key 'defaults' in params of {config['target']}")
        groups = _by_factor(parameters, factors) if factors else {}
        params = [{"params": members} for members in groups.values()] or list(parameters)
        optimizer = instantiate_from_config(config, params=params, lr=rate)
        for group, factor in zip(optimizer.param_groups, groups, strict=False):
            group["lr"] = group["lr"] * factor  # not in place, since groups may share a tensor
        _check_kind(str(config["target"]), optimizer)
    optimizer.register_load_state_dict_pre_hook(_in_float32)
    return optimizer


def _by_factor(
    parameters: Iterable[nn.Parameter], factors: Mapping[nn.Parameter, float]
) -> dict[float, list[nn.Parameter]]:
    """Return the parameters by their factor of the learning rate, in the order of their first ones."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    return groups


def _check_kind(target: str, optimizer: Optimizer) -> None:
    """Refuse an `optimizer` of which a run would use wrong weights or rates, and warn about a rate that is too low.

    Raises:
        UserError: it has other weights in training than in use, or cannot have a learning rate for each group.
    """
    refuse_if(
        callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)),
        f"{target}: it trains other weights than the averaged ones that images, validation and checkpoints need, "
        "and changing between them rounds, so that no resumed run equals an uninterrupted one; "
        "use torch.optim.AdamW with model.params.use_ema=True, which keeps an average",
    )
    if type(optimizer).__name__ == "Prodigy":
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        refuse_if(
            len(rates) > 1, f"{target}: it has one learning rate for all parameters; give one instead of {len(rates)}"
        )
        if 0 < max(rates) < _PRODIGY_RATE:
            log.warning(
                "%s estimates the learning rate and multiplies it by lr=%g, which almost stops the training; set "
                "model.params.optimizer_config.params.lr=1",
                target, max(rates),
            )  # fmt: skip


def _in_float32(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return `state_dict` with the quantised moments of a low-bit optimizer, if any, as float32 tensors.

    The low-bit optimizers themselves load states without this hook. Settings that they do not have are those of
    `optimizer`.
    """
    state = state_dict["state"]
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in
                        (state_dict["param_groups"], optimizer.param_groups))  # fmt: skip
    quantised = any(_is_quantised(value) for moments in state.values() for value in moments.values())
    if not quantised or sizes != own_sizes:  # torch has a message for other sizes
        return state_dict
    from ldm.optim.quantised import dequantised  # needs torchao

    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    shapes = {number: parameter.shape for number, parameter in zip(numbers, parameters, strict=True)}
    plain = {
        number: {
            name: dequantised(value, shapes[number]) if _is_quantised(value) else value
            for name, value in moments.items()
        }
        for number, moments in state.items()
    }
    groups = [
        {**own, **saved, "lr": float(saved["lr"])}
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    return {**state_dict, "state": plain, "param_groups": groups}


def _is_quantised(value: Any) -> bool:
    return isinstance(value, dict) and "codes" in value
