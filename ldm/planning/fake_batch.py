"""A batch such as a config's data would give, with nothing in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.encoders.modules import ClassEmbedder, DummyEncoder
from ldm.util import UserError, get_obj_from_str

_TEXT_TOKENS = 77


def gives_pictures(model: DDPM, config: DictConfig) -> bool:
    """Whether the data are pictures, which a latent model's first stage encodes at every step."""
    target = (config.get("data") or {}).get("target")
    module = get_obj_from_str(target) if target else None
    is_pre_encoded = isinstance(module, type) and issubclass(module, WebDataNpyModuleFromConfig)
    return not isinstance(model, LatentDiffusion) or not is_pre_encoded


def make_batch(model: DDPM, config: DictConfig, pictures: int | None = None, size: int | None = None) -> dict[str, Any]:
    """The entries that `model` reads of a batch of `pictures`, `size` pixels a side; by default those of `config`.

    Where the config has a prior, its samples come on top.

    Raises:
        UserError: `config` names no batch size and none is given, or the size does not fit the model.
    """
    params = (config.get("data") or {}).get("params") or {}
    pictures = pictures or params.get("batch_size")
    if not isinstance(pictures, int) or pictures < 1:
        raise UserError(f"batch size {pictures}: give a whole number from 1, as in data.params.batch_size=4")
    if params.get("prior_urls"):
        pictures += round(pictures * params.get("prior_ratio", 1.0))
    factor = model.first_stage_model.downsampling if isinstance(model, LatentDiffusion) else 1
    side = model.image_size if size is None else size // factor
    step = factor * getattr(model.model.diffusion_model, "downsampling", 1)
    if side < 1 or side * factor % step or (size or 0) % step:
        raise UserError(f"{size or side * factor} pixels a side: the model takes multiples of {step}")
    if gives_pictures(model, config):
        channels = 3 if isinstance(model, LatentDiffusion) else model.channels
        data = torch.empty(pictures, side * factor, side * factor, channels)
    else:
        data = torch.empty(pictures, 2 * model.channels, side, side, dtype=torch.float16)
    return {model.first_stage_key: data, **_conditioning(model, pictures)}


def _conditioning(model: DDPM, pictures: int) -> Mapping[str, Any]:
    stage = getattr(model, "cond_stage_model", None)
    if stage is None or model.model.conditioning_key is None:
        return {}
    if isinstance(stage, DummyEncoder):
        width = model.model.diffusion_model.context_dim
        return {stage.key: torch.empty(pictures, _TEXT_TOKENS, width, dtype=torch.float16)}
    if isinstance(stage, ClassEmbedder):
        return {stage.key: torch.zeros(pictures, dtype=torch.long)}
    return {model.cond_stage_key: ["a picture"] * pictures}
