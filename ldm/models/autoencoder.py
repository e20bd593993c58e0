"""First stages of latent diffusion: autoencoders (arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import load_file_into
from ldm.models.autoencoder_training import TrainedAutoencoder, build_coders
from ldm.models.vector_quantized import VQModel, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface"]


class AutoencoderKL(TrainedAutoencoder):
    """Autoencoder with a Gaussian posterior, trainable or as a frozen first stage.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: training loss, such as `ldm.modules.losses.LPIPSWithDiscriminator`; `torch.nn.Identity` for frozen
            use.
        embed_dim: channels of the latents.
        ckpt_path, ignore_keys: initial weights, and prefixes of their keys to skip.
        image_key: batch entry that holds the images, channels last (B, H, W, C) in [-1, 1].
        colorize_nlabels: number of channels of label maps. For previews, they are projected to random colours.
        monitor, freeze_encoder: as in `TrainedAutoencoder`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__(image_key, monitor, freeze_encoder)
        self.embed_dim = embed_dim
        self.encoder, self.decoder = build_coders(ddconfig, double_z=True)
        self.loss = instantiate_from_config(lossconfig)
        z_channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.prepare_training(colorize_nlabels)
        if ckpt_path is not None:
            load_file_into(self, ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior over the latents (B, embed_dim, H/f, W/f) of images (B, C, H, W)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return reconstructions of images (B, C, H, W) and the posterior. The latent is sampled, or else the mode."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def reconstructed(self, images: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        return self(images)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Tensor], N: int = 8, only_inputs: bool = False, split: str = "train"
    ) -> dict[str, Tensor]:
        """Return previews (n, 3, H, W) in [-1, 1]: the first `N` inputs, their reconstructions, prior samples."""
        inputs = self.get_input(batch, self.image_key)[:N].to(self.device)
        images = {"inputs": inputs}
        if not only_inputs:
            images["reconstructions"], posterior = self(inputs)
            images["samples"] = self.decode(torch.randn_like(posterior.mode()))
        return {name: self.to_rgb(image) for name, image in images.items()}


class IdentityFirstStage(nn.Module):
    """First stage of a diffusion model on pixels, which returns its input."""

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()
        self.vq_interface = vq_interface
        self.downsampling = 1

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return x

    def quantize(self, x: Tensor) -> Any:
        """Return `x`, or with `vq_interface` the triple (quantized, loss, info) of a vector quantizer."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        return x
