"""Latent diffusion with maps concatenated to the noisy latent: inpainting, depth to image, upscaling, layout.

B: batch. H, W: height and width of an image. C, h, w: channels, height and width of its latent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.first_stage import dtype_of
from ldm.models.diffusion.initial_weights import FIRST_CONVOLUTION_KEYS
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.random_streams import GLOBAL_STREAM, RandomStreams
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, instantiate_from_config, refuse_if

log = logging.getLogger(__name__)

_DEPTH_SIDE, _DEPTH_MULTIPLE = 384, 32  # of the image that the depth network sees, in pixels


class LatentFinetuneDiffusion(LatentDiffusion):
    """Base of models whose first convolution has more input channels than the release that they start from.

    Args:
        concat_keys: batch entries that join the input, in order.
        finetune_keys: tensors of `ckpt_path` that may have fewer input channels than the model. New channels start at
            0. None for no such tensor.
        keep_finetune_dims: number of input channels loaded from the file.
        c_concat_log_start, c_concat_log_end: accepted for old configs and ignored.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] | None = None,
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION_KEYS,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        conditioning_key: str | None = "hybrid",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        del c_concat_log_start, c_concat_log_end
        super().__init__(concat_keys=concat_keys, conditioning_key=conditioning_key, **kwargs)
        self.finetune_keys = tuple(finetune_keys or ())
        self.keep_finetune_dims = keep_finetune_dims
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def latent_size(self, batch: Batch) -> tuple[int, int]:
        """Return h and w of the latents of a batch."""
        x = batch_entry(batch, self.first_stage_key)
        if self.is_pre_encoded(x):
            return x.shape[2], x.shape[3]
        factor = self.first_stage_model.downsampling
        return x.shape[1] // factor, x.shape[2] // factor


def check_map(key: str, shapes: Mapping[str, Sequence[int]], channels: Sequence[int]) -> None:
    """Raise `UserError` unless the map `key`, if it is among `shapes`, has one of the numbers of `channels`."""
    shape = shapes.get(key)
    if shape is not None and (len(shape) != 3 or shape[0] not in channels):
        raise UserError(f"{key} has shape {tuple(shape)}; the model takes {' or '.join(map(str, channels))} channels")


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Inpainting model. The input is x, the mask (1 where the model paints) and the latent of the masked image.

    The mask has the shape (B, H, W, 1), or (B, 1, h, w) at the latent's size. The masked image has the shape
    (B, H, W, 3), or is pre-encoded like the images; see `LatentDiffusion`.

    Args:
        masked_image_key: entry of `concat_keys` that the first stage encodes.
    """

    default_concat_keys = ("mask", "masked_image")

    def __init__(self, masked_image_key: str = "masked_image", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.masked_image_key = masked_image_key
        refuse_if(
            masked_image_key not in self.concat_keys,
            f"masked_image_key {masked_image_key!r} is not one of concat_keys: {', '.join(self.concat_keys)}",
        )
        if masked_image_key != self.concat_keys[-1]:
            log.warning(
                "concat_keys %s: released inpainting models take the mask first, then %s; their weights fit only that",
                ", ".join(self.concat_keys),
                masked_image_key,
            )

    def check_batch_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        for key in self.concat_keys:
            valid = (self.channels, 2 * self.channels) if key == self.masked_image_key else (1,)
            check_map(key, shapes, valid)
        super().check_batch_shapes(shapes)

    def concatenated(self, batch: Batch) -> list[Tensor]:
        return [
            self.latent_of(batch, key, RandomStreams.of(batch))
            if key == self.masked_image_key
            else self.mask(batch, key)
            for key in self.concat_keys
        ]

    def latent_of(self, batch: Batch, key: str, streams: RandomStreams = GLOBAL_STREAM) -> Tensor:
        """Return the scaled latent (B, C, h, w) of the entry `key`, sampled from its posterior."""
        encoded = self.encode_batch({self.first_stage_key: batch_entry(batch, key)})
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.sample(noise=streams.normal(key, encoded.mean))
        return self.scale_factor * encoded

    def mask(self, batch: Batch, key: str) -> Tensor:
        """Return the mask `key` at the latent's size, (B, 1, h, w): the upper left pixel of each cell."""
        mask = batch_entry(batch, key).float()
        if mask.ndim == 3:
            mask = mask[:, None]  # B 1 H W
        elif mask.shape[1] != 1:
            mask = rearrange(mask, "b h w c -> b c h w")
        return F.interpolate(mask, size=self.latent_size(batch), mode="nearest")


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Depth to image model. The input is x and a depth map at the latent's size, in [-1, 1].

    An entry of `concat_keys` with one channel is a depth map (B, 1, H, W). Other entries are inputs of the depth stage.

    Args:
        depth_stage_config: `target` and `params` of the frozen network that estimates depth; None for a model that
            reads stored depth maps.
    """

    default_concat_keys = ("midas_in",)

    def __init__(
        self,
        depth_stage_config: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.depth_model = None
        if depth_stage_config is not None:
            self.depth_model = instantiate_from_config(depth_stage_config).eval().requires_grad_(False)
        if ckpt_path is not None:  # after the depth stage, so that its weights are loaded too
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def train(self, mode: bool = True) -> LatentDepth2ImageDiffusion:
        super().train(mode)
        if getattr(self, "depth_model", None) is not None:  # the base constructor calls `train` first
            self.depth_model.eval()
        return self

    @torch.no_grad()
    def concatenated(self, batch: Batch) -> list[Tensor]:
        return [self.depth(batch_entry(batch, key), self.latent_size(batch)) for key in self.concat_keys]

    def depth(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the depth map (B, 1, h, w) of `x`: 2 (d − min) / (max − min + 0.001) − 1 per sample."""
        depth = _resized(x.float(), size) if x.shape[1] == 1 else self.estimated_depth(x, size)
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        return 2.0 * (depth - low) / (high - low + 0.001) - 1.0

    @torch.no_grad()
    def estimated_depth(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the depth (B, 1, h, w), float32, that the network estimates for its inputs `x` (B, 3, H, W).

        Raises:
            UserError: the model has no depth network.
        """
        if self.depth_model is None:
            raise UserError(
                f"{self.concat_keys[0]} has {x.shape[1]} channels; a model without depth_stage_config takes depth maps"
            )
        return _resized(self.depth_model(x.to(dtype_of(self.depth_model))).float(), size)

    def check_batch_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        for key in self.concat_keys if self.depth_model is None else ():
            check_map(key, shapes, (1,))
        super().check_batch_shapes(shapes)


def for_depth_network(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) at the size that the depth network was trained on."""
    scale = _DEPTH_SIDE / min(images.shape[-2:])
    size = [max(1, round(side * scale / _DEPTH_MULTIPLE)) * _DEPTH_MULTIPLE for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)


def _resized(depth: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(depth, size=size, mode="bicubic", align_corners=False)


class LatentUpscaleDiffusion(LatentDiffusion):
    """Upscaling model. The input is x, a noisy low-resolution image at the latent's size, and its noise level.

    Args:
        low_scale_config: `target` and `params` of the frozen stage that adds the noise, image → (map, level (B,)).
        low_scale_key: batch entry of the low-resolution image (B, h, w, 3) in [-1, 1].
        noise_level_key: batch entry with noise levels, in place of levels that the stage samples.
    """

    def __init__(
        self,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        concat_keys: Sequence[str] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(concat_keys=concat_keys or (low_scale_key,), **kwargs)
        self.low_scale_key = low_scale_key
        self.noise_level_key = noise_level_key
        self.low_scale_model = instantiate_from_config(low_scale_config).eval().requires_grad_(False)
        if ckpt_path is not None:  # after the low-scale stage, so that its weights are loaded too
            self.init_from_ckpt(ckpt_path, ignore_keys, only_model=load_only_unet)

    def train(self, mode: bool = True) -> LatentUpscaleDiffusion:
        super().train(mode)
        if hasattr(self, "low_scale_model"):  # the base constructor calls `train` first
            self.low_scale_model.eval()
        return self

    @torch.no_grad()
    def maps_and_labels(self, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        image = self.get_input(batch, self.low_scale_key)
        given = None if self.noise_level_key is None else batch_entry(batch, self.noise_level_key).flatten()
        noised, level = self.low_scale_model(image) if given is None else self.low_scale_model(image, given)
        return [noised], {"c_adm": level}


class Layout2ImgDiffusion(LatentDiffusion):
    """Layout to image model, conditioned on boxes and their classes as one sequence of tokens per image.

    Args:
        cond_stage_key: batch entry of the tokens; must be `coordinates_bbox`.

    Raises:
        UserError: `cond_stage_key` is not `coordinates_bbox`.
    """

    def __init__(self, cond_stage_key: str = "coordinates_bbox", **kwargs: Any) -> None:
        refuse_if(
            cond_stage_key != "coordinates_bbox",
            f"cond_stage_key {cond_stage_key!r}: must be 'coordinates_bbox' for Layout2ImgDiffusion",
        )
        super().__init__(cond_stage_key=cond_stage_key, **kwargs)
