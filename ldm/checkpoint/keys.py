"""Names of the keys in checkpoints: prefixes of the parts, noise schedule, EMA weights, optional keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from ldm.modules.ema import shadow_name

T = TypeVar("T")

MODEL = "model."
UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
COND_STAGE = "cond_stage_model."
CONDITIONER = "conditioner."  # text encoders of SDXL
TOWERS = tuple(f"{CONDITIONER}embedders.{number}." for number in range(2))  # those of its embedders with weights
TEXT_ENCODERS = (COND_STAGE, CONDITIONER)
DEPTH_STAGE = "depth_model."  # network of SD 2 that estimates depth
EMA = "model_ema."
EMA_DECAY, EMA_UPDATES = EMA_COUNTERS = (f"{EMA}decay", f"{EMA}num_updates")
SCALE_FACTOR = "scale_factor"  # of the latents
POSITION_IDS = "position_ids"  # a constant of text encoders, which some releases store

# Values that a model computes from its config: buffers of the noise schedule, and the scale of the latents.
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
    SCALE_FACTOR,
    "cond_ids",
)
# Marks of SDXL files that predict v, and of those whose schedule ends without signal; their values are empty.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# Parts of OpenCLIP text towers that their outputs do not need: files may lack them. SDXL's projection is needed.
_UNUSED_BY_TOWERS = (
    *(f"{COND_STAGE}model.logit_scale", f"{COND_STAGE}model.text_projection"),
    *(f"{CONDITIONER}*.logit_scale", "*.attn_mask"),
)
# Keys that a file may carry or lack without harm, as shell patterns: the above, and values that only training needs.
OPTIONAL_KEYS = (
    *SCHEDULE_KEYS,
    "logvar",
    f"{EMA}*",
    f"*{POSITION_IDS}",
    f"{FIRST_STAGE}loss.*",
    "loss.*",
    *_UNUSED_BY_TOWERS,
)


def is_optional(key: str, patterns: Sequence[str] = OPTIONAL_KEYS) -> bool:
    """Return whether one of `patterns` fits `key`."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def ema_key(key: str) -> str:
    """Return the key of the EMA of the weight `key`, which begins with `model.`."""
    return EMA + shadow_name(key.removeprefix(MODEL))


def has_part(keys: Iterable[str], prefix: str) -> bool:
    """Return whether any of `keys` begins with `prefix`."""
    return any(key.startswith(prefix) for key in keys)


def with_ema_as_weights(weights: Mapping[str, T], wanted: Iterable[str]) -> dict[str, T]:
    """Return `weights` in which the EMA stands in for each `wanted` weight below `model.`, if there are no others.

    A file that holds EMA weights alone can be loaded so. EMA keys have no dots, so `wanted` must list the model's keys.
    """
    if has_part(weights, MODEL) or not has_part(weights, EMA):
        return dict(weights)
    shadows = {key: ema_key(key) for key in wanted if key.startswith(MODEL)}
    return {**weights, **{key: weights[shadow] for key, shadow in shadows.items() if shadow in weights}}
