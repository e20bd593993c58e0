"""First stages: autoencoders whose latents the diffusion models work on (arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from ldm.checkpoint import load_file_into
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.contperceptual import AUTOENCODER, DISCRIMINATOR
from ldm.util import UserError, check_params, instantiate_from_config

# Adam's moments as VQGAN was trained: short memories, since each player's target moves.
_BETAS = (0.5, 0.9)


def _coders(ddconfig: Mapping[str, Any], double_z: bool) -> tuple[Encoder, Decoder]:
    """The encoder and the decoder that `ddconfig` describes; its `double_z` must be `double_z`."""
    check_params("ddconfig", Encoder, ddconfig)
    for parameter in (*signature(Encoder).parameters.values(), *signature(Decoder).parameters.values()):
        if parameter.default is Parameter.empty and parameter.name not in ddconfig:
            raise UserError(f"ddconfig lacks the key {parameter.name!r}")
    if ddconfig.get("double_z", True) is not double_z:
        raise UserError(f"ddconfig: double_z must be {str(double_z).lower()} for this kind of autoencoder")
    return Encoder(**ddconfig), Decoder(**ddconfig)


class AutoencoderKL(pl.LightningModule):
    """The autoencoder with a Gaussian posterior, frozen (as a first stage) or in training.

    Without a GAN term, training is Lightning's automatic optimization. With one, it is manual, with one optimizer for
    the autoencoder and one for the discriminator, and `global_step` counts the steps of both.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: the training loss, such as `ldm.modules.losses.LPIPSWithDiscriminator`; `torch.nn.Identity` for
            frozen use.
        embed_dim: channels of the latents.
        ckpt_path, ignore_keys: weights to start from, and prefixes of the keys to leave out.
        image_key: the batch entry that holds the images, channels last (B, H, W, C) in [-1, 1].
        colorize_nlabels: for label maps of that many channels: pictures of them are projected to random colours.
        monitor: the logged value that checkpoints are chosen by.
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
    ) -> None:
        super().__init__()
        self.image_key = image_key
        self.embed_dim = embed_dim
        self.monitor = monitor
        self.learning_rate: float | None = None  # set by whoever trains
        self.encoder, self.decoder = _coders(ddconfig, double_z=True)
        self.downsampling = 2 ** (len(self.encoder.down) - 1)  # pixels a latent pixel, each way
        self.loss = instantiate_from_config(lossconfig)
        z_channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        self.adversarial = getattr(self.loss, "adversarial", False)
        self.automatic_optimization = not self.adversarial
        if ckpt_path is not None:
            load_file_into(self, ckpt_path, ignore_keys)

    def encode(self, x: torch.Tensor) -> DiagonalGaussianDistribution:
        """Images (B, C, H, W) -> the posterior over their latents (B, embed_dim, H/f, W/f)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Unscaled latents (B, embed_dim, h, w) -> images (B, C, h*f, w*f)."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, input: torch.Tensor, sample_posterior: bool = True
    ) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        """Images (B, C, H, W) -> their reconstructions and their posterior; from a drawn latent, or from the mode."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def get_last_layer(self) -> torch.Tensor:
        return self.decoder.conv_out.weight

    def get_input(self, batch: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
        """Entry `key` of `batch`, (B, H, W, C) or (B, H, W), as float images (B, C, H, W)."""
        if key not in batch:
            raise UserError(f"image_key {key!r} is not in the batch, which has {', '.join(map(str, batch))}")
        x = batch[key]
        if x.ndim == 3:
            x = x[..., None]
        return x.movedim(-1, 1).to(dtype=self.dtype, memory_format=torch.contiguous_format)

    # Training

    def setup(self, stage: str) -> None:
        if isinstance(self.loss, nn.Identity):
            raise UserError(
                "lossconfig names torch.nn.Identity, which is for a frozen autoencoder; "
                "to train it, set lossconfig.target to ldm.modules.losses.LPIPSWithDiscriminator"
            )

    @property
    def autoencoder_steps(self) -> int:
        """Optimizer steps that the autoencoder itself has taken."""
        return self.global_step // 2 if self.adversarial else self.global_step

    def _player_loss(
        self, inputs: torch.Tensor, output: tuple[torch.Tensor, DiagonalGaussianDistribution], player: int, split: str
    ) -> torch.Tensor:
        reconstructions, posterior = output
        if reconstructions.shape != inputs.shape:
            height, width = inputs.shape[2:]
            raise UserError(f"images of {height}x{width} do not halve evenly in the autoencoder; resize them")
        loss, values = self.loss(
            inputs,
            reconstructions,
            posterior,
            player,
            self.autoencoder_steps,
            last_layer=self.get_last_layer(),
            split=split,
        )
        for name, value in values.items():
            self.log(name, value, prog_bar=name.endswith("rec_loss"), batch_size=len(inputs))
        return loss

    def training_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        inputs = self.get_input(batch, self.image_key)
        output = self(inputs)
        if not self.adversarial:
            return self._player_loss(inputs, output, AUTOENCODER, "train")
        for player, optimizer in zip((AUTOENCODER, DISCRIMINATOR), self.optimizers(), strict=True):
            # Freezes the other player: the autoencoder's loss passes through the discriminator.
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self._player_loss(inputs, output, player, "train"))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        return None

    def validation_step(self, batch: Mapping[str, torch.Tensor], batch_idx: int) -> None:
        inputs = self.get_input(batch, self.image_key)
        output = self(inputs)
        for player in (AUTOENCODER, DISCRIMINATOR) if self.adversarial else (AUTOENCODER,):
            self._player_loss(inputs, output, player, "val")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        if self.learning_rate is None:
            raise UserError("no learning rate: set model.base_learning_rate in the config")
        parts = (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        players = [[parameter for part in parts for parameter in part.parameters()]]
        if self.adversarial:
            players.append(list(self.loss.discriminator.parameters()))
        return [torch.optim.Adam(parameters, lr=self.learning_rate, betas=_BETAS) for parameters in players]

    # Pictures

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, torch.Tensor], N: int = 8, only_inputs: bool = False, split: str = "train"
    ) -> dict[str, torch.Tensor]:
        """Pictures (n, 3, H, W) in [-1, 1]: the first `N` images, their reconstructions, and samples of the prior."""
        inputs = self.get_input(batch, self.image_key)[:N].to(self.device)
        images = {"inputs": inputs}
        if not only_inputs:
            images["reconstructions"], posterior = self(inputs)
            images["samples"] = self.decode(torch.randn_like(posterior.mode()))
        return {name: self._to_rgb(image) for name, image in images.items()}

    def _to_rgb(self, x: torch.Tensor) -> torch.Tensor:
        """Label maps as colours, scaled to [-1, 1]; pictures stay as they are."""
        if not hasattr(self, "colorize"):
            return x
        x = F.conv2d(x, self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) - 1.0


class VQModelInterface(nn.Module):
    """A frozen VQ first stage (VQGAN, arXiv:2012.09841): the latents are those before quantization; decoding quantizes.

    The quantizer is taming-transformers', an optional extra. Training it is out of scope: `lossconfig` must be
    `torch.nn.Identity`, as it is in the released configs. Weights under `loss.*` in a checkpoint are left out.

    Args:
        embed_dim, n_embed: channels of the latents, and entries in the codebook.
        remap, sane_index_shape: as the quantizer takes them.
        monitor, image_key, colorize_nlabels: accepted from the configs of the training of such models; no use here.

    Raises:
        UserError: taming-transformers is not installed.
    """

    def __init__(
        self,
        embed_dim: int,
        n_embed: int,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        remap: str | None = None,
        sane_index_shape: bool = False,
    ) -> None:
        super().__init__()
        if lossconfig.get("target") != "torch.nn.Identity":
            raise UserError(
                f"VQModelInterface is a frozen first stage; set its lossconfig.target to torch.nn.Identity, "
                f"not {lossconfig.get('target')!r}"
            )
        self.encoder, self.decoder = _coders(ddconfig, double_z=False)
        self.downsampling = 2 ** (len(self.encoder.down) - 1)  # pixels a latent pixel, each way
        self.quantize = _vector_quantizer()(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if ckpt_path is not None:
            load_file_into(self, ckpt_path, ignore_keys)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> latents (B, embed_dim, H/f, W/f), not yet quantized."""
        return self.quant_conv(self.encoder(x))

    def decode(self, h: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
        """Latents (B, embed_dim, h, w), quantized first unless `force_not_quantize` -> images (B, C, h*f, w*f)."""
        quantized = h if force_not_quantize else self.quantize(h)[0]
        return self.decoder(self.post_quant_conv(quantized))


def _vector_quantizer() -> type[nn.Module]:
    try:
        from taming.modules.vqvae.quantize import VectorQuantizer2
    except ImportError as error:
        raise UserError(
            "VQModelInterface needs taming-transformers, an optional extra; "
            "install it with: pip install --no-deps taming-transformers-rom1504"
        ) from error
    return VectorQuantizer2


class IdentityFirstStage(nn.Module):
    """The first stage of a diffusion model on pixels: gives back what it takes."""

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()
        self.vq_interface = vq_interface
        self.downsampling = 1

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def quantize(self, x: torch.Tensor) -> Any:
        """`x`; with `vq_interface` as the triple (quantized, loss, info) of a vector quantizer."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
