"""Fake batch with the shapes and dtypes of a config's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.models.diffusion.ddpm import DDPM, LatentDepth2ImageDiffusion, LatentDiffusion
from ldm.models.diffusion.ddpm_edit import LatentDiffusion as EditDiffusion
from ldm.modules.encoders.modules import (
    ClassEmbedder,
    ConcatTimestepEmbedderND,
    DummyEncoder,
    GeneralConditioner,
)
from ldm.shards.sample import CONTEXT, DEPTH, EDIT, MASK, MASKED_IMAGE, NOISE, PREDICTION, SIZE_ENTRIES, TIMESTEPS
from ldm.util import UserError, get_obj_from_str, refuse_if

_TEXT_TOKENS = 77
_CAPTION = "an image"
_DEPTH_SIDE = 384  # side of the images that MiDaS takes, in pixels


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
    refuse_if(
        not isinstance(images, int) or images < 1,
        f"batch size {images}: give a whole number from 1, as in data.params.batch_size=4",
    )
    if params.get("prior_urls"):
        images += round(images * params.get("prior_ratio", 1.0))
    factor = model.first_stage_model.downsampling if isinstance(model, LatentDiffusion) else 1
    side = model.image_size if size is None else size // factor
    step = factor * getattr(model.model.diffusion_model, "downsampling", 1)
    if side < 1 or side * factor % step or (size or 0) % step:
        raise UserError(f"{size or side * factor} pixels per side: give a multiple of {step}, as the model needs")
    is_encoded = not has_image_data(model, config)
    if is_encoded:
        data = _stored(images, 2 * model.channels, side, side)
    elif isinstance(model, EditDiffusion):
        data = torch.empty(images, 3, side * factor, side * factor)
    else:
        channels = 3 if isinstance(model, LatentDiffusion) else model.channels
        data = torch.empty(images, side * factor, side * factor, channels)
    batch = {model.first_stage_key: data, **_conditioning(model, images), **_predictions(model, images, side)}
    batch |= {key: _stored(images, 1, side, side) for key in model.weighting.entries}  # loss masks
    if not isinstance(model, LatentDiffusion) or not model.model.takes_maps:
        return batch
    return batch | (_encoded_maps(model, images, side) if is_encoded else _image_maps(model, images, side * factor))


def _predictions(model: DDPM, images: int, side: int) -> Mapping[str, Tensor]:
    """Return a teacher's members, if the loss reads them from every sample."""
    if not model.weighting.reads_predictions:
        return {}
    latents = {key: _stored(images, model.channels, side, side) for key in (NOISE, PREDICTION)}
    return {TIMESTEPS: torch.zeros(images, dtype=torch.long), **latents}


def _stored(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16)


def _conditioning(model: DDPM, images: int) -> Mapping[str, Any]:
    stage = getattr(model, "cond_stage_model", None)
    if stage is None or model.model.conditioning_key is None:
        return {}
    context = _stored(images, _TEXT_TOKENS, getattr(model.model.diffusion_model, "context_dim", None) or 1)
    if isinstance(stage, GeneralConditioner):
        return {key: _embedder_entry(model, key, context) for key in stage.input_keys}
    if isinstance(stage, DummyEncoder):
        return {stage.key: context}
    if isinstance(stage, ClassEmbedder):
        return {stage.key: torch.zeros(images, dtype=torch.long)}
    return {model.cond_stage_key: [_CAPTION] * images}


def _embedder_entry(model: LatentDiffusion, key: str, context: Tensor) -> Any:
    """Return the batch entry `key` of a `GeneralConditioner`."""
    stage, images = model.cond_stage_model, len(context)
    if key not in stage.other_keys:
        return [_CAPTION] * images
    if key in SIZE_ENTRIES:
        return torch.zeros(images, 2)
    if key == CONTEXT:
        return context
    sizes = sum(2 * part.outdim for part in stage.embedders if isinstance(part, ConcatTimestepEmbedderND))
    return _stored(images, model.model.diffusion_model.adm_in_channels - sizes)


def _encoded_maps(model: LatentDiffusion, images: int, side: int) -> Mapping[str, Any]:
    channels = {MASK: 1, MASKED_IMAGE: 2 * model.channels, EDIT: model.channels, DEPTH: 1}
    return {key: _stored(images, channels.get(key, 1), side, side) for key in model.concat_keys}


def _image_maps(model: LatentDiffusion, images: int, side: int) -> Mapping[str, Any]:
    if isinstance(model, EditDiffusion):
        captions = [_CAPTION] * images
        return {model.cond_stage_key: {"c_concat": torch.empty(images, 3, side, side), "c_crossattn": captions}}
    if isinstance(model, LatentDepth2ImageDiffusion):
        return {key: torch.empty(images, 3, _DEPTH_SIDE, _DEPTH_SIDE) for key in model.concat_keys}
    masked = getattr(model, "masked_image_key", None)
    return {key: torch.empty(images, side, side, 3 if key == masked else 1) for key in model.concat_keys}
