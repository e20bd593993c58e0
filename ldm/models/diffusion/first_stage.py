"""First stage of latent diffusion: encoding of images, decoding of latents, and the device of its weights.

B: batch. C, H, W: channels, height and width of an image. C, h, w: those of its latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.random_streams import GLOBAL_STREAM, RandomStreams
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

# Device of the first stage while training does not use it.
_HOST = torch.device("cpu")


def _device(module: nn.Module) -> torch.device | None:
    """Return the device of the module's weights, or None if it has no weights."""
    return next((parameter.device for parameter in module.parameters()), None)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of the module's weights, or float32 if it has no weights."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


class WithFirstStage:
    """Mixin of `LatentDiffusion` for its `first_stage_model`.

    It calls `get_input` of `DDPM`, which must be a later base.
    """

    first_stage_model: nn.Module
    first_stage_key: str
    cond_stage_model: nn.Module | None
    channels: int
    scale_factor: float | Tensor

    def _first_stage_at(self, device: torch.device) -> nn.Module:
        """Return the first stage after moving it to `device`."""
        if _device(self.first_stage_model) not in (None, device):
            self.first_stage_model.to(device)
        return self.first_stage_model

    def _put_first_stage_away(self, batch: Batch) -> None:
        """Move the first stage to the host if batches like this one do not use it."""
        is_used = self.cond_stage_model is self.first_stage_model
        if not is_used and self.is_pre_encoded(batch_entry(batch, self.first_stage_key)):
            self._first_stage_at(_HOST)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Encode images (B, 3, H, W) in [-1, 1]. Return the posterior, or the latent if there is no posterior."""
        return self._first_stage_at(x.device).encode(x.to(dtype_of(self.first_stage_model)))

    def get_first_stage_encoding(
        self, encoded: DiagonalGaussianDistribution | Tensor, streams: RandomStreams = GLOBAL_STREAM
    ) -> Tensor:
        """Return `scale_factor` times the latent (B, C, h, w), sampled if `encoded` is a posterior."""
        is_posterior = isinstance(encoded, DiagonalGaussianDistribution)
        latent = encoded.sample(noise=streams.normal("latent", encoded.mean)) if is_posterior else encoded
        return self.scale_factor * latent

    def most_likely_latent(self, encoded: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Return `scale_factor` times the latent (B, C, h, w), the mode if `encoded` is a posterior."""
        latent = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return self.scale_factor * latent

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Decode scaled latents z (B, C, h, w). Return images (B, 3, H, W), about [-1, 1]."""
        latent = (z / self.scale_factor).to(dtype_of(self.first_stage_model))
        return self._first_stage_at(z.device).decode(latent)

    def is_pre_encoded(self, x: Tensor) -> bool:
        """Return True if a batch entry holds posterior parameters or latents, and not images."""
        return x.ndim == 4 and x.shape[1] in (self.channels, 2 * self.channels)

    def encode_batch(self, batch: Batch) -> DiagonalGaussianDistribution | Tensor:
        """Return the unscaled posterior or latent of the batch entry `first_stage_key`; see `LatentDiffusion`."""
        x = batch_entry(batch, self.first_stage_key)
        if not self.is_pre_encoded(x):
            return self.encode_first_stage(super().get_input(batch, self.first_stage_key))
        # In float32, because float16 is too coarse for the exponential of the log-variance.
        return DiagonalGaussianDistribution(x.float()) if x.shape[1] == 2 * self.channels else x.float()
