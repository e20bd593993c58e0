"""The first stage of latent diffusion: images to latents and back, and the place of its weights meanwhile.

B batch; C, H, W channels, height and width of an image; C, h, w those of its latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.models.diffusion.batch import Batch, batch_entry
from ldm.models.diffusion.draws import FROM_GLOBAL, Draws
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

# The device of the first stage while training does without it.
_HOST = torch.device("cpu")


def _device(module: nn.Module) -> torch.device | None:
    """Return the device of the module's weights; None if it has none."""
    return next((parameter.device for parameter in module.parameters()), None)


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the type of the module's weights; float32 if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


class WithFirstStage:
    """Mixin of `LatentDiffusion` for its `first_stage_model`.

    `DDPM`, whose `get_input` it calls, must follow it among the bases.
    """

    first_stage_model: nn.Module
    first_stage_key: str
    cond_stage_model: nn.Module | None
    channels: int
    scale_factor: float | Tensor

    def _first_stage_at(self, device: torch.device) -> nn.Module:
        """Return the first stage, brought to `device` if it is elsewhere."""
        if _device(self.first_stage_model) not in (None, device):
            self.first_stage_model.to(device)
        return self.first_stage_model

    def _put_first_stage_away(self, batch: Batch) -> None:
        """Move the first stage to the host, if batches such as this one do not need it."""
        is_used = self.cond_stage_model is self.first_stage_model
        if not is_used and self.is_pre_encoded(batch_entry(batch, self.first_stage_key)):
            self._first_stage_at(_HOST)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Return the posterior, or the latent itself, of images (B, 3, H, W) in [-1, 1]."""
        return self._first_stage_at(x.device).encode(x.to(_dtype(self.first_stage_model)))

    def get_first_stage_encoding(
        self, encoded: DiagonalGaussianDistribution | Tensor, draws: Draws = FROM_GLOBAL
    ) -> Tensor:
        """Return a latent (B, C, h, w) sampled from the posterior, or the one given, times `scale_factor`."""
        is_posterior = isinstance(encoded, DiagonalGaussianDistribution)
        latent = encoded.sample(noise=draws.normal("latent", encoded.mean)) if is_posterior else encoded
        return self.scale_factor * latent

    def most_likely_latent(self, encoded: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Return the posterior's mode (B, C, h, w), or the latent given, times `scale_factor`."""
        latent = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return self.scale_factor * latent

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Return the images (B, 3, H, W), about [-1, 1], of scaled latents z (B, C, h, w)."""
        latent = (z / self.scale_factor).to(_dtype(self.first_stage_model))
        return self._first_stage_at(z.device).decode(latent)

    def is_pre_encoded(self, x: Tensor) -> bool:
        """Return whether a batch entry is a posterior's parameters or a latent, channels first, rather than images."""
        return x.ndim == 4 and x.shape[1] in (self.channels, 2 * self.channels)

    def encode_batch(self, batch: Batch) -> DiagonalGaussianDistribution | Tensor:
        """Return the unscaled posterior or latent of the entry `first_stage_key`; see `LatentDiffusion`."""
        x = batch_entry(batch, self.first_stage_key)
        if not self.is_pre_encoded(x):
            return self.encode_first_stage(super().get_input(batch, self.first_stage_key))
        # float32 before sampling: stored float16 is too coarse for the exponential of the log variance.
        return DiagonalGaussianDistribution(x.float()) if x.shape[1] == 2 * self.channels else x.float()
