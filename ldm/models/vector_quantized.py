"""Autoencoders with a codebook (VQGAN, arXiv:2012.09841), trainable or as a frozen first stage.

The quantizer is that of taming-transformers, an optional extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.checkpoint import load_file_into
from ldm.checkpoint.keys import EMA, has_part
from ldm.models.autoencoder_training import TrainedAutoencoder, build_coders
from ldm.modules.ema import LitEma
from ldm.modules.losses.vqperceptual import Quantized
from ldm.optim import build_schedule
from ldm.util import UserError, get_obj_from_str, instantiate_from_config

# β of VQGAN, eq. 4, in the released models.
_COMMITMENT = 0.25


class _QuantizedNetworks(nn.Module):
    """Mixin that builds the networks of an autoencoder with a codebook."""

    def build_coders(self, ddconfig: Mapping[str, Any]) -> None:
        """Add `encoder` and `decoder`."""
        self.encoder, self.decoder = build_coders(ddconfig, double_z=False)

    def build_quantizer(
        self, z_channels: int, n_embed: int, embed_dim: int, remap: str | None, sane_index_shape: bool
    ) -> None:
        """Add `quantize` and the two convolutions around it."""
        options = {"beta": _COMMITMENT, "remap": remap, "sane_index_shape": sane_index_shape}
        self.quantize = _vector_quantizer(type(self).__name__)(n_embed, embed_dim, **options)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Return the latents (B, embed_dim, H/f, W/f) of images (B, C, H, W) before quantization."""
        return self.quant_conv(self.encoder(x))


class VQModel(_QuantizedNetworks, TrainedAutoencoder):
    """Autoencoder whose latents are entries of a codebook.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: training loss, such as `ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator`;
            `torch.nn.Identity` for frozen use.
        n_embed, embed_dim: number of codebook entries, and channels of the latents.
        ckpt_path, ignore_keys: initial weights, and prefixes of their keys to skip.
        image_key: batch entry that holds the images (B, H, W, C) in [-1, 1].
        colorize_nlabels: number of channels of label maps. For previews, they are projected to random colours.
        monitor, freeze_encoder: as in `TrainedAutoencoder`. The codebook belongs to the encoder.
        batch_resize_range: two sizes in pixels. Each training batch is resized to a random multiple of 16 between them.
        scheduler_config: `target` and `params` of a schedule of both learning rates, from `ldm.lr_scheduler`.
        lr_g_factor: ratio of the autoencoder's learning rate to that of the discriminator.
        remap, sane_index_shape: arguments of the quantizer.
        use_ema: keep a moving average of the weights, for previews.

    Raises:
        UserError: taming-transformers is not installed.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__(image_key, monitor, freeze_encoder)
        self.n_embed, self.embed_dim = n_embed, embed_dim
        self.batch_resize_range = batch_resize_range
        self.scheduler_config = scheduler_config
        self.lr_g_factor = lr_g_factor
        self.use_ema = use_ema
        self.build_coders(ddconfig)
        self.loss = instantiate_from_config(_own_loss(lossconfig))
        self.build_quantizer(ddconfig["z_channels"], n_embed, embed_dim, remap, sane_index_shape)
        self.prepare_training(colorize_nlabels)
        if use_ema:
            self.model_ema = LitEma(self)
        if ckpt_path is not None:
            report = load_file_into(self, ckpt_path, ignore_keys)
            if use_ema and has_part(report.missing, EMA):
                del self.model_ema  # the average must not include itself
                self.model_ema = LitEma(self)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Return the quantized latents (B, embed_dim, H/f, W/f) of images, the codebook loss and the indices."""
        return self.quantize(self.encode_to_prequant(x))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Return the images of the codebook entries at indices (B, h, w)."""
        return self.decode(self.quantize.embedding(code_b).movedim(-1, 1))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Return reconstructions of images (B, C, H, W), the codebook loss, and optionally the indices."""
        quant, codebook_loss, (_, _, indices) = self.encode(input)
        output = self.decode(quant), codebook_loss
        return (*output, indices) if return_pred_indices else output

    # Training

    def reconstructed(self, images: Tensor) -> tuple[Tensor, Quantized]:
        reconstructions, codebook_loss, indices = self(images, return_pred_indices=True)
        return reconstructions, Quantized(codebook_loss, indices)

    def training_images(self, batch: Mapping[str, Tensor]) -> Tensor:
        x = super().training_images(batch)
        if self.batch_resize_range is None:
            return x
        low, high = self.batch_resize_range
        sizes = torch.arange(low, high + 16, 16)
        # The first steps use the largest size, so that an out-of-memory error occurs at once.
        size = int(sizes[-1] if self.global_step <= 4 else sizes[torch.randint(len(sizes), ())])
        return x if size == x.shape[2] else F.interpolate(x, size=size, mode="bicubic")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.use_ema:
            self.model_ema(self)

    def encoder_modules(self) -> Sequence[nn.Module]:
        return *super().encoder_modules(), self.quantize

    def own_modules(self) -> Sequence[nn.Module]:
        return *super().own_modules(), self.quantize

    def learning_rates(self) -> tuple[float, float]:
        return self.lr_g_factor * self.learning_rate, self.learning_rate

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        if not self.scheduler_config:
            return optimizers
        schedule = build_schedule(self.scheduler_config)
        self.schedules = [LambdaLR(optimizer, lr_lambda=schedule) for optimizer in optimizers]
        if self.automatic_optimization:
            return optimizers, [{"scheduler": self.schedules[0], "interval": "step", "frequency": 1}]
        return optimizers, self.schedules

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if self.scheduler_config and not self.automatic_optimization:
            for schedule in self.lr_schedulers():
                schedule.step()
        return loss

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Tensor], N: int = 8, only_inputs: bool = False, split: str = "train"
    ) -> dict[str, Tensor]:
        """Return previews (n, 3, H, W) in [-1, 1]: the first `N` inputs and their reconstructions, and the EMA's."""
        inputs = self.get_input(batch, self.image_key)[:N].to(self.device)
        images = {"inputs": inputs}
        if not only_inputs:
            images["reconstructions"] = self(inputs)[0]
            if self.use_ema:
                with self.model_ema.applied_to(self):
                    images["reconstructions_ema"] = self(inputs)[0]
        return {name: self.to_rgb(image) for name, image in images.items()}


class VQModelInterface(_QuantizedNetworks):
    """Frozen first stage with a codebook. Latents are taken before quantization, and decoding quantizes them.

    Train such a model with `VQModel`. `lossconfig` must be `torch.nn.Identity` or `DummyLoss`, as in the released
    configs. Weights under `loss.*` in a checkpoint are skipped.

    Args:
        embed_dim, n_embed: channels of the latents, and number of codebook entries.
        remap, sane_index_shape: arguments of the quantizer.
        monitor, image_key, colorize_nlabels: accepted for training configs and ignored.

    Raises:
        UserError: taming-transformers is not installed, or `lossconfig` is not `torch.nn.Identity`.
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
        loss = get_obj_from_str(lossconfig.get("target"))
        if not (isinstance(loss, type) and issubclass(loss, nn.Identity)):
            raise UserError(
                f"VQModelInterface is a frozen first stage; set its lossconfig.target to torch.nn.Identity, "
                f"not {lossconfig.get('target')!r}"
            )
        self.build_coders(ddconfig)
        self.downsampling = 2 ** (len(self.encoder.down) - 1)  # pixels per latent pixel along each side
        self.build_quantizer(ddconfig["z_channels"], n_embed, embed_dim, remap, sane_index_shape)
        if ckpt_path is not None:
            load_file_into(self, ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents (B, embed_dim, H/f, W/f) of images (B, C, H, W) before quantization."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Return the images (B, C, h*f, w*f) of latents (B, embed_dim, h, w), quantized unless `force_not_quantize`."""
        quantized = h if force_not_quantize else self.quantize(h)[0]
        return self.decoder(self.post_quant_conv(quantized))


def _own_loss(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the loss. The loss of taming-transformers needs torchvision, and is replaced by our own."""
    theirs = config.get("target") == "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    return {**config, "target": "ldm.modules.losses.VQLPIPSWithDiscriminator"} if theirs else config


def _vector_quantizer(wanted_by: str) -> type[nn.Module]:
    try:
        from taming.modules.vqvae.quantize import VectorQuantizer2
    except ImportError as error:
        raise UserError(
            f"{wanted_by} needs taming-transformers, an optional extra; "
            "install it with: pip install --no-deps taming-transformers-rom1504"
        ) from error
    return VectorQuantizer2
