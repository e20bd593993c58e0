"""Cond stages with spatial output: reduced segmentation maps, and low-resolution images as noisy latents.

B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.upscaling import LowScaleModel
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.util import check_choice, check_number, instantiate_from_config

_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class SpatialRescaler(AbstractEncoder):
    """Resizing by `multiplier`, `n_stages` times, and an optional projection of channels: (B, C, H, W) → (B, C', h, w).

    Args:
        method: interpolation method.
        in_channels, out_channels: channels of the 1 × 1 convolution at the end; without `out_channels` there is none.
        bias: give this convolution a bias.

    Raises:
        UserError: the method is unknown, or the number of stages is negative.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_choice("method", method, _METHODS)
        check_number("n_stages", n_stages, least=0)
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if hasattr(self, "channel_mapper") else x


class LowScaleEncoder(LowScaleModel):
    """Encoder of a low-resolution image to a noisy latent, the input of an upscaler: (B, 3, H, W) → (B, C, h, w).

    Args:
        model_config: `target` and `params` of the autoencoder.
        linear_start, linear_end, timesteps: noise schedule.
        max_noise_level: exclusive upper limit of sampled noise levels.
        output_size: height and width of the result; None keeps those of the latent.
        scale_factor: factor that multiplies the latents.
    """

    def __init__(
        self,
        model_config: Mapping[str, Any],
        linear_start: float,
        linear_end: float,
        timesteps: int = 1000,
        max_noise_level: int = 250,
        output_size: int | None = 64,
        scale_factor: float = 1.0,
    ) -> None:
        schedule = {"timesteps": timesteps, "linear_start": linear_start, "linear_end": linear_end}
        super().__init__(schedule, max_noise_level)
        self.model = instantiate_from_config(model_config).requires_grad_(False)
        self.out_size = output_size
        self.scale_factor = scale_factor

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the noisy latent and the noise levels (B,)."""
        encoded = self.model.encode(x)
        latent = encoded.sample() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        latent, noise_level = super().forward(latent * self.scale_factor, noise_level)
        if self.out_size is not None:
            latent = F.interpolate(latent, size=self.out_size, mode="nearest")
        return latent, noise_level

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return the image of a latent."""
        return self.model.decode(z / self.scale_factor)
