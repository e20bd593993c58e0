"""Training of autoencoders, with a discriminator or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.lpips_weights import fill_lpips
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.losses.adversarial import AUTOENCODER, DISCRIMINATOR
from ldm.util import UserError, check_params

# Adam's moments as VQGAN was trained: short memories, since each player's target moves.
_BETAS = (0.5, 0.9)


def build_coders(ddconfig: Mapping[str, Any], double_z: bool) -> tuple[Encoder, Decoder]:
    """Return the encoder and the decoder that `ddconfig` describes.

    Raises:
        UserError: a key is unknown or missing, or its `double_z` is another.
    """
    check_params("ddconfig", Encoder, ddconfig)
    for parameter in (*signature(Encoder).parameters.values(), *signature(Decoder).parameters.values()):
        if parameter.default is Parameter.empty and parameter.name not in ddconfig:
            raise UserError(f"ddconfig lacks the key {parameter.name!r}")
    if ddconfig.get("double_z", True) is not double_z:
        raise UserError(f"ddconfig: double_z must be {str(double_z).lower()} for this kind of autoencoder")
    return Encoder(**ddconfig), Decoder(**ddconfig)


class TrainedAutoencoder(pl.LightningModule):
    """Base of autoencoders that train on images, against their `loss`.

    Without a GAN term, training is Lightning's automatic optimization. With one, it is manual, with one optimizer for
    the autoencoder and one for the discriminator, and `global_step` counts the steps of both.

    A subclass builds `encoder`, `decoder`, `quant_conv`, `post_quant_conv` and `loss`, calls `prepare_training`, and
    defines `reconstructed`.
    """

    def __init__(self, image_key: str = "image", monitor: str | None = None) -> None:
        super().__init__()
        self.image_key = image_key
        self.monitor = monitor
        self.learning_rate: float | None = None  # set by whoever trains

    def prepare_training(self, colorize_nlabels: int | None) -> None:
        """Fill `loss` with its weights and choose its optimization; set the colours of so many labels."""
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if getattr(self.loss, "perceptual_loss", None) is not None:
            fill_lpips(self.loss.perceptual_loss, self.loss.perceptual_ckpt)
            self.loss.perceptual_is_filled = True
        self.adversarial = getattr(self.loss, "adversarial", False)
        self.automatic_optimization = not self.adversarial

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel, each way."""
        return 2 ** (len(self.encoder.down) - 1)

    def reconstructed(self, images: Tensor) -> tuple[Tensor, Any]:
        """Return the reconstructions (B, C, H, W), and what the loss takes beside them."""
        raise NotImplementedError

    def get_last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def get_input(self, batch: Mapping[str, Tensor], key: str) -> Tensor:
        """Return entry `key` of `batch`, (B, H, W, C) or (B, H, W), as float images (B, C, H, W)."""
        if key not in batch:
            raise UserError(f"image_key {key!r} is not in the batch, which has {', '.join(map(str, batch))}")
        x = batch[key]
        if x.ndim == 3:
            x = x[..., None]
        return x.movedim(-1, 1).to(dtype=self.dtype, memory_format=torch.contiguous_format)

    def training_images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the images (B, C, H, W) of a training batch."""
        return self.get_input(batch, self.image_key)

    def setup(self, stage: str) -> None:
        if isinstance(self.loss, nn.Identity):
            raise UserError(
                "lossconfig names torch.nn.Identity, which is for a frozen autoencoder; "
                "to train it, set lossconfig.target to ldm.modules.losses.LPIPSWithDiscriminator"
            )
        check = getattr(self.loss, "check_trainable", None)
        if check is not None:
            check()

    @property
    def autoencoder_steps(self) -> int:
        """Optimizer steps that the autoencoder itself has taken."""
        return self.global_step // 2 if self.adversarial else self.global_step

    def _player_loss(self, inputs: Tensor, output: tuple[Tensor, Any], player: int, split: str) -> Tensor:
        reconstructions, latent = output
        if reconstructions.shape != inputs.shape:
            height, width = inputs.shape[2:]
            raise UserError(f"images of {height}x{width} do not halve evenly in the autoencoder; resize them")
        steps, last_layer = self.autoencoder_steps, self.get_last_layer()
        loss, values = self.loss(inputs, reconstructions, latent, player, steps, last_layer=last_layer, split=split)
        for name, value in values.items():
            self.log(name, value, prog_bar=name.endswith("rec_loss"), batch_size=len(inputs))
        return loss

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        inputs = self.training_images(batch)
        output = self.reconstructed(inputs)
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

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        inputs = self.get_input(batch, self.image_key)
        output = self.reconstructed(inputs)
        for player in (AUTOENCODER, DISCRIMINATOR) if self.adversarial else (AUTOENCODER,):
            self._player_loss(inputs, output, player, "val")

    def trained_modules(self) -> Sequence[nn.Module]:
        """Return the parts of the autoencoder, which the first optimizer trains."""
        return self.encoder, self.decoder, self.quant_conv, self.post_quant_conv

    def learning_rates(self) -> tuple[float, float]:
        """Return the learning rates of the autoencoder and of the discriminator."""
        return self.learning_rate, self.learning_rate

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        if self.learning_rate is None:
            raise UserError("no learning rate: set model.base_learning_rate in the config")
        players = [[parameter for part in self.trained_modules() for parameter in part.parameters()]]
        if self.adversarial:
            players.append(list(self.loss.discriminator.parameters()))
        rates = zip(players, self.learning_rates(), strict=False)
        return [torch.optim.Adam(parameters, lr=rate, betas=_BETAS) for parameters, rate in rates]

    def to_rgb(self, x: Tensor) -> Tensor:
        """Return label maps as colours, scaled to [-1, 1]; images stay as they are."""
        if not hasattr(self, "colorize"):
            return x
        x = F.conv2d(x, self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) - 1.0
