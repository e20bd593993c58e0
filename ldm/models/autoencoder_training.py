"""Training of autoencoders, with or without a discriminator."""

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
from ldm.util import UserError, check_params, entry_of, refuse_if

# Adam's decay rates of VQGAN. They are low because the target of each player changes.
_BETAS = (0.5, 0.9)


def build_coders(ddconfig: Mapping[str, Any], double_z: bool) -> tuple[Encoder, Decoder]:
    """Return the encoder and the decoder of `ddconfig`.

    Raises:
        UserError: a key is unknown or missing, or `double_z` differs from the argument.
    """
    check_params("ddconfig", Encoder, ddconfig)
    parameters = (*signature(Encoder).parameters.values(), *signature(Decoder).parameters.values())
    required = [parameter.name for parameter in parameters if parameter.default is Parameter.empty]
    missing = next((name for name in required if name not in ddconfig), None)
    refuse_if(missing, f"ddconfig lacks the key {missing!r}; add it")
    refuse_if(
        ddconfig.get("double_z", True) is not double_z,
        f"ddconfig: double_z must be {str(double_z).lower()} for this kind of autoencoder",
    )
    return Encoder(**ddconfig), Decoder(**ddconfig)


class TrainedAutoencoder(pl.LightningModule):
    """Base of autoencoders that train on images with their `loss`.

    Without a GAN term, training uses Lightning's automatic optimization. With a GAN term, it uses manual optimization
    with one optimizer for the autoencoder and one for the discriminator. `global_step` counts the steps of both.

    A subclass builds `encoder`, `decoder`, `quant_conv`, `post_quant_conv` and `loss`, calls `prepare_training`, and
    defines `reconstructed`.

    Args:
        image_key: batch entry that holds the images, channels last (B, H, W, C) in [-1, 1].
        monitor: logged value that selects the best checkpoints.
        freeze_encoder: train the decoder alone. The latents of images stay as they are, so a diffusion model of these
            latents, and sets of them, can be used with the new decoder.
    """

    def __init__(self, image_key: str = "image", monitor: str | None = None, freeze_encoder: bool = False) -> None:
        super().__init__()
        self.image_key = image_key
        self.monitor = monitor
        self.freeze_encoder = freeze_encoder
        self.learning_rate: float | None = None  # set before training

    def prepare_training(self, colorize_nlabels: int | None) -> None:
        """Load the weights of `loss`, select the optimization, and sample a colour for each of `colorize_nlabels`."""
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if getattr(self.loss, "perceptual_loss", None) is not None:
            fill_lpips(self.loss.perceptual_loss, self.loss.perceptual_ckpt)
            self.loss.perceptual_is_filled = True
        self.adversarial = getattr(self.loss, "adversarial", False)
        self.automatic_optimization = not self.adversarial

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel along each side."""
        return 2 ** (len(self.encoder.down) - 1)

    def reconstructed(self, images: Tensor) -> tuple[Tensor, Any]:
        """Return the reconstructions (B, C, H, W) and the further input of the loss."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Return the images (B, C, h*f, w*f) of unscaled latents (B, embed_dim, h, w)."""
        return self.decoder(self.post_quant_conv(z))

    def get_last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def get_input(self, batch: Mapping[str, Tensor], key: str) -> Tensor:
        """Return entry `key` of `batch`, (B, H, W, C) or (B, H, W), as float images (B, C, H, W)."""
        x = entry_of(batch, key, "image_key")
        if x.ndim == 3:
            x = x[..., None]
        return x.movedim(-1, 1).to(dtype=self.dtype, memory_format=torch.contiguous_format)

    def training_images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the images (B, C, H, W) of a training batch."""
        return self.get_input(batch, self.image_key)

    def setup(self, stage: str) -> None:
        refuse_if(
            isinstance(self.loss, nn.Identity),
            f"lossconfig.target is {type(self.loss).__name__}, which is for a frozen autoencoder; "
            "to train it, set lossconfig.target to ldm.modules.losses.LPIPSWithDiscriminator",
        )
        check = getattr(self.loss, "check_trainable", None)
        if check is not None:
            check()
        frozen = list(self.encoder_modules()) if self.freeze_encoder else []
        if not self.adversarial and hasattr(self.loss, "discriminator"):
            frozen.append(self.loss.discriminator)  # no optimizer has it
        for part in frozen:
            part.requires_grad_(False)

    @property
    def autoencoder_steps(self) -> int:
        """Number of the autoencoder's optimizer steps."""
        return self.global_step // 2 if self.adversarial else self.global_step

    def _player_loss(self, inputs: Tensor, output: tuple[Tensor, Any], player: int, split: str) -> Tensor:
        reconstructions, latent = output
        if reconstructions.shape != inputs.shape:
            height, width = inputs.shape[2:]
            raise UserError(
                f"images of {height}x{width} do not halve evenly in the autoencoder; "
                f"resize them to multiples of {self.downsampling}"
            )
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
            # Freeze the other player, because the autoencoder's loss depends on the discriminator.
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

    def encoder_modules(self) -> Sequence[nn.Module]:
        """Return the modules that the latents of an image depend on."""
        return self.encoder, self.quant_conv

    def trained_modules(self) -> Sequence[nn.Module]:
        """Return the modules that the first optimizer trains, in the order of the state of their optimizer."""
        frozen = self.encoder_modules() if self.freeze_encoder else ()
        return [part for part in self.own_modules() if part not in frozen]

    def own_modules(self) -> Sequence[nn.Module]:
        """Return the modules of the autoencoder. A resume needs their order."""
        return self.encoder, self.decoder, self.quant_conv, self.post_quant_conv

    def learning_rates(self) -> tuple[float, float]:
        """Return the learning rates of the autoencoder and of the discriminator."""
        return self.learning_rate, self.learning_rate

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        refuse_if(self.learning_rate is None, "no learning rate: set model.base_learning_rate in the config")
        players = [[parameter for part in self.trained_modules() for parameter in part.parameters()]]
        if self.adversarial:
            players.append(list(self.loss.discriminator.parameters()))
        rates = zip(players, self.learning_rates(), strict=False)
        return [torch.optim.Adam(parameters, lr=rate, betas=_BETAS) for parameters, rate in rates]

    def to_rgb(self, x: Tensor) -> Tensor:
        """Return label maps as colours in [-1, 1], and images unchanged."""
        if not hasattr(self, "colorize"):
            return x
        x = F.conv2d(x, self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) - 1.0
