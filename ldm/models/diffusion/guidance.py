"""Classifier-free guidance: combination of predictions under several conditionings.

B: batch. x has the shape (B, C, H, W).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.util import UserError

# Argument of the model's `apply_model`: a tensor, a list of tensors, or a dict of these.
Conditioning = Any


class Denoiser(Protocol):
    """Parts of a model that a sampler uses. A model without `parameterization` predicts ε."""

    num_timesteps: int
    alphas_cumprod: Tensor

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


def concatenate(first: Conditioning, *others: Conditioning) -> Conditioning:
    """Concatenate conditionings of the same form along the batch."""
    if isinstance(first, dict):
        return {key: concatenate(first[key], *(other[key] for other in others)) for key in first}
    if isinstance(first, (list, tuple)):
        return [concatenate(*parts) for parts in zip(first, *others, strict=True)]
    return torch.cat([first, *others])


def guided_output(
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float,
    image_scale: float | None = None,
    rescale: float = 0.0,
) -> Tensor:
    """Return uncond + scale · (cond − uncond) (arXiv:2207.12598, eq. 6, with scale = 1 + w).

    With `image_scale`, the conditionings are dicts, and the result is (arXiv:2211.09800, eq. 3)
    uncond + image_scale · (image − uncond) + scale · (cond − image), where `image` has the caption of `uncond`.
    If all scales are 1, the result is the prediction under `cond`. `rescale` is the share of `rescaled`.
    """
    if scale == 1.0 and image_scale in (None, 1.0):
        return model.apply_model(x, t, cond)
    if image_scale is not None:
        return _guided_by_image(model, x, t, cond, uncond, scale, image_scale, rescale)
    if uncond is None:
        return model.apply_model(x, t, cond)
    both = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), concatenate(uncond, cond))
    without, with_cond = both.float().chunk(2)  # in float32, because half precision rounds the difference
    return rescaled(without + scale * (with_cond - without), with_cond, rescale)


def _guided_by_image(
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float,
    image_scale: float,
    rescale: float,
) -> Tensor:
    if not (isinstance(cond, dict) and isinstance(uncond, dict) and {"c_concat", "c_crossattn"} <= cond.keys()):
        raise UserError(
            f"image guidance scale {image_scale}: this model is not conditioned on an image and a caption; "
            "leave the scale out"
        )
    image = {**uncond, "c_concat": cond["c_concat"]}
    outputs = model.apply_model(torch.cat([x] * 3), torch.cat([t] * 3), concatenate(uncond, image, cond))
    without, with_image, with_both = outputs.float().chunk(3)
    guided = without + image_scale * (with_image - without) + scale * (with_both - with_image)
    return rescaled(guided, with_both, rescale)


def rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Return `guided` (B, …) with the standard deviation of each sample moved by `share` towards that of `cond`.

    With φ = `share`, this is φ · guided · std(cond) / std(guided) + (1 − φ) · guided (arXiv:2305.08891, eq. 15 and 16).
    """
    if share == 0.0:
        return guided
    deviations = [values.flatten(1).std(1).view(-1, *(1,) * (values.ndim - 1)) for values in (cond, guided)]
    return guided * (share * deviations[0] / deviations[1] + (1 - share))
