"""Key names in checkpoints: prefixes of parts, noise schedule, EMA weights and optional keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from ldm.modules.ema import shadow_name

T = TypeVar("T")

MODEL = "model."
UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
ENCODER = ("encoder.", "quant_conv.")  # of an autoencoder
COND_STAGE = "cond_stage_model."
CONDITIONER = "conditioner."  # text encoders of SDXL
TOWERS = tuple(f"{CONDITIONER}embedders.{number}." for number in range(2))  # its embedders with weights
TEXT_ENCODERS = (COND_STAGE, CONDITIONER)
DEPTH_STAGE = "depth_model."  # network of SD 2 that estimates depth
EMA = "model_ema."
EMA_DECAY, EMA_UPDATES = EMA_COUNTERS = (f"{EMA}decay", f"{EMA}num_updates")
SCALE_FACTOR = "scale_factor"  # scale factor of the latents
POSITION_IDS = "position_ids"  # constant of text encoders in some releases

# Values that follow from the config: buffers of the noise schedule, and the scale factor of the latents.
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
# Ends of the keys of a LoRA in a training checkpoint, after the path of their layer; and these keys as shell patterns.
FACTOR_ENDS = DOWN, UP, ALPHA = (".lora.down", ".lora.up", ".lora.alpha")
FACTORS = tuple(f"*{end}" for end in FACTOR_ENDS)
# Empty marker tensors in SDXL files, for v-prediction and for zero terminal SNR.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
PREDICTION_MARKERS = (V_PREDICTION, ZERO_SNR)
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# Entry of a training checkpoint: the UNet's prediction, in the terms of the config.
PREDICTION = "parameterization"
# Entry of a training checkpoint: `name` and `sha256` of the release file that training started from.
RELEASE = "release"
# Unused parts of OpenCLIP text towers, which files may lack. SDXL uses the projection.
UNUSED_BY_TOWERS = (
    *(f"{COND_STAGE}model.logit_scale", f"{COND_STAGE}model.text_projection"),
    *(f"{CONDITIONER}*.logit_scale", "*.attn_mask"),
)
# Optional keys of a file, as shell patterns: the keys above, and values for training only.
OPTIONAL_KEYS = (
    *SCHEDULE_KEYS,
    "logvar",
    f"{EMA}*",
    f"*{POSITION_IDS}",
    f"{FIRST_STAGE}loss.*",
    "loss.*",
    *UNUSED_BY_TOWERS,
)


def is_optional(key: str, patterns: Sequence[str] = OPTIONAL_KEYS) -> bool:
    """Return True if `key` matches one of `patterns`."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def is_factor(key: str) -> bool:
    """Return True for the key of a value of a LoRA in a training checkpoint; see `ldm.modules.lora`."""
    return key.endswith(FACTOR_ENDS)


def ema_key(key: str) -> str:
    """Return the EMA key of the weight `key`, which begins with `model.`."""
    return EMA + shadow_name(key.removeprefix(MODEL))


def without_factors(weights: Mapping[str, T]) -> dict[str, T]:
    """Return `weights` without the values of a LoRA that is trained, and without the EMA of these."""
    factors = {key for key in weights if is_factor(key)}
    left_out = factors | {ema_key(key) for key in factors if key.startswith(MODEL)}
    return {key: value for key, value in weights.items() if key not in left_out}


def has_part(keys: Iterable[str], prefix: str) -> bool:
    """Return True if one of `keys` begins with `prefix`."""
    return any(key.startswith(prefix) for key in keys)


def with_ema_as_weights(weights: Mapping[str, T], wanted: Iterable[str]) -> dict[str, T]:
    """Return `weights` with EMA weights under the `wanted` keys below `model.`, if there are no other weights.

    This loads files that hold only EMA weights. EMA keys have no dots, so `wanted` must list the keys of the model.
    """
    if has_part(weights, MODEL) or not has_part(weights, EMA):
        return dict(weights)
    shadows = {key: ema_key(key) for key in wanted if key.startswith(MODEL)}
    return {**weights, **{key: weights[shadow] for key, shadow in shadows.items() if shadow in weights}}
