"""The one loader of weights into a module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm.checkpoint.reading import load_state_dict
from ldm.util import UserError

log = logging.getLogger(__name__)

# What a model computes from its config: buffers of the noise schedule, and the latents' scale.
SCHEDULE_KEYS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "scale_factor",
    "cond_ids",
)
# Keys that a file may carry or lack without harm (shell patterns): these, and what only training has.
OPTIONAL_KEYS = (*SCHEDULE_KEYS, "logvar", "model_ema.*", "*position_ids", "first_stage_model.loss.*", "loss.*")

_PART_BYTES = 2**28


class LoadReport(NamedTuple):
    """Keys that the module has and the weights lack, and the reverse; all of them optional ones."""

    missing: list[str]
    unexpected: list[str]


def is_optional(key: str, patterns: Sequence[str] = OPTIONAL_KEYS) -> bool:
    """Whether one of `patterns` fits `key`."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    *,
    source: str = "the checkpoint",
    optional: Sequence[str] = OPTIONAL_KEYS,
    assign: bool = False,
    after_part: Callable[[], None] | None = None,
) -> LoadReport:
    """Load `state_dict` into `module`; keys that match `optional` (shell patterns) may be missing or unexpected.

    The text tower, `cond_stage_model.*`, is also optional in the weights of a module whose cond stage has none.
    `assign` makes the tensors the module's own instead of copying them. `source` names the weights in messages.
    `after_part` is called whenever some hundred megabytes have been copied, to give up the memory they were read into.

    Raises:
        UserError: a shape differs, or a key that is not optional is missing or unexpected; nothing is loaded then.
    """
    own = module.state_dict()
    for key, value in state_dict.items():
        if key in own and value.shape != own[key].shape:
            shapes = f"{tuple(value.shape)}, the model's is {tuple(own[key].shape)}"
            raise UserError(f"{source}: {key} has shape {shapes}; is this a checkpoint of another model?")
    optional = list(optional)
    if not any(key.startswith("cond_stage_model.") for key in own):
        optional.append("cond_stage_model.*")
    report = LoadReport([key for key in own if key not in state_dict], [key for key in state_dict if key not in own])
    for keys, what in zip(report, ("lacks", "has unexpected"), strict=True):
        required = [key for key in keys if not is_optional(key, optional)]
        if required:
            raise UserError(f"{source}: {what} {_some(required)}; is this a checkpoint of another model?")
        if keys:
            log.info("%s: %s %s (fine)", source, what, _some(keys))
    for part in _parts(state_dict):
        module.load_state_dict(part, strict=False, assign=assign)
        if after_part is not None:
            after_part()
    return report


def load_file_into(
    module: nn.Module, path: str | Path, ignore_keys: Sequence[str] = (), prefix: str = ""
) -> LoadReport:
    """Load the weights of the file at `path`, but for keys that start with one of `ignore_keys`, into `module`.

    With `prefix`, only the keys that begin with it count, and lose it.

    Raises:
        UserError: the file cannot be read, or does not fit the module.
    """
    weights = {
        key.removeprefix(prefix): value
        for key, value in load_state_dict(path).items()
        if key.startswith(prefix) and not key.startswith(tuple(ignore_keys))
    }
    optional = (*OPTIONAL_KEYS, *(f"{key}*" for key in ignore_keys))
    return load_into(module, weights, source=str(path), optional=optional)


def _parts(state_dict: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """`state_dict` in parts of at least `_PART_BYTES`."""
    part, size = {}, 0
    for key, value in state_dict.items():
        part[key] = value
        size += value.nbytes
        if size >= _PART_BYTES:
            yield part
            part, size = {}, 0
    yield part


def _some(keys: Sequence[str], shown: int = 3) -> str:
    more = f", … ({len(keys)} keys)" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
