"""Fake batch with the shapes and dtypes of a config's data."""

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


def has_image_data(model: DDPM, config: DictConfig) -> bool:
    """Return True if the data are images, so that the first stage of a latent model encodes them at every step."""
    target = (config.get("data") or {}).get("target")
    module = get_obj_from_str(target) if target else None
    is_pre_encoded = isinstance(module, type) and issubclass(module, WebDataNpyModuleFromConfig)
    return not isinstance(model, LatentDiffusion) or not is_pre_encoded


def make_batch(model: DDPM, config: DictConfig, images: int | None = None, size: int | None = None) -> dict[str, Any]:
    """Return the entries of a batch that `model` reads.

    Args:
        images: batch size; `data.params.batch_size` by default. The samples of a prior in `config` are added.
        size: side of an image in pixels; the model's own by default.

    Raises:
        UserError: there is no batch size, or the size does not fit the model.
    """
    params = (config.get("data") or {}).get("params") or {}
    images = images or params.get("batch_size")
    if not isinstance(images, int) or images < 1:
        raise UserError(f"batch size {images}: give a whole number from 1, as in data.params.batch_size=4")
    if params.get("prior_urls"):
        images += round(images * params.get("prior_ratio", 1.0))
    factor = model.first_stage_model.downsampling if isinstance(model, LatentDiffusion) else 1
    side = model.image_size if size is None else size // factor
    step = factor * getattr(model.model.diffusion_model, "downsampling", 1)
    if side < 1 or side * factor % step or (size or 0) % step:
        raise UserError(f"{size or side * factor} pixels per side: give a multiple of {step}, as the model needs")
    if has_image_data(model, config):
        channels = 3 if isinstance(model, LatentDiffusion) else model.channels
        data = torch.empty(images, side * factor, side * factor, channels)
    else:
        data = torch.empty(images, 2 * model.channels, side, side, dtype=torch.float16)
    return {model.first_stage_key: data, **_conditioning(model, images)}


def _conditioning(model: DDPM, images: int) -> Mapping[str, Any]:
    stage = getattr(model, "cond_stage_model", None)
    if stage is None or model.model.conditioning_key is None:
        return {}
    if isinstance(stage, DummyEncoder):
        width = model.model.diffusion_model.context_dim
        return {stage.key: torch.empty(images, _TEXT_TOKENS, width, dtype=torch.float16)}
    if isinstance(stage, ClassEmbedder):
        return {stage.key: torch.zeros(images, dtype=torch.long)}
    return {model.cond_stage_key: ["an image"] * images}
