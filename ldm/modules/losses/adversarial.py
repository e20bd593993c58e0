"""Shared parts of the autoencoder losses: pixel and perceptual error, and the GAN term of VQGAN.

The GAN term and its adaptive weight follow arXiv:2012.09841, equations 6 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.losses.discriminator import PatchDiscriminator, hinge_loss, vanilla_loss
from ldm.modules.losses.lpips import LPIPS
from ldm.util import UserError, check_choice, check_number, refuse_if

_DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}

AUTOENCODER, DISCRIMINATOR = 0, 1  # values of `optimizer_idx`


class AdversarialLoss(nn.Module):
    """Base class of the losses with a discriminator.

    Args:
        disc_start: autoencoder step at which the GAN term starts.
        pixelloss_weight: weight of the absolute error.
        disc_factor: weight of the GAN term for both players; 0 turns it off and sets `adversarial` to False.
        disc_weight: constant weight of the autoencoder's GAN term, multiplied by the adaptive weight.
        perceptual_weight: weight of LPIPS (arXiv:1801.03924); it needs `perceptual_ckpt`.
        perceptual_ckpt: files with the weights of VGG16 and of LPIPS on it; see `ldm.models.lpips_weights`.
        disc_conditional: give the discriminator `cond` and the image, stacked along the channels.
        disc_ndf: channels of the discriminator's first layer.
        disc_loss: 'hinge' or 'vanilla'.
    """

    def __init__(
        self,
        disc_start: int,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        perceptual_ckpt: str | Sequence[str] | None = None,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
    ) -> None:
        super().__init__()
        check_number("perceptual_weight", perceptual_weight, least=0, whole=False)
        check_choice("disc_loss", disc_loss, tuple(_DISCRIMINATOR_LOSSES))
        self.disc_start = disc_start
        self.pixelloss_weight = pixelloss_weight
        self.disc_factor = disc_factor
        self.disc_weight = disc_weight
        self.perceptual_weight = perceptual_weight
        self.disc_conditional = disc_conditional
        self.disc_loss = _DISCRIMINATOR_LOSSES[disc_loss]
        self.perceptual_ckpt = perceptual_ckpt
        self.perceptual_is_filled = False  # True after the autoencoder has read `perceptual_ckpt`
        self.perceptual_loss: LPIPS | None = None
        if perceptual_weight > 0 and perceptual_ckpt is not None:
            self.perceptual_loss = LPIPS()
        self.discriminator = PatchDiscriminator(disc_in_channels, disc_num_layers, disc_ndf, use_actnorm=use_actnorm)

    @property
    def adversarial(self) -> bool:
        """True if the GAN term is used, so that the discriminator needs an optimizer."""
        return self.disc_factor > 0

    def check_trainable(self) -> None:
        """Raise `UserError` if the weights of the perceptual term are missing."""
        refuse_if(
            self.perceptual_weight > 0 and not self.perceptual_is_filled,
            f"perceptual_weight {self.perceptual_weight} needs the weights of VGG16 and LPIPS; give the file in "
            "lossconfig.params.perceptual_ckpt, or set perceptual_weight to 0 there",
        )

    def error(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the error of each value, (B, C, H, W), and the values to log."""
        self.check_trainable()
        error = self.pixelloss_weight * (inputs - reconstructions).abs()
        if self.perceptual_loss is None:
            return error, {}
        perceptual = self.perceptual_loss(inputs, reconstructions)  # B 1 1 1
        return error + self.perceptual_weight * perceptual, {"p_loss": perceptual.mean()}

    def active(self, global_step: int) -> float:
        """Return the weight of the GAN term at autoencoder step `global_step`."""
        return self.disc_factor if global_step >= self.disc_start else 0.0

    def gan_term(
        self, nll: Tensor, reconstructions: Tensor, last_layer: Tensor | None, cond: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the autoencoder's GAN term, weighted relative to `nll`, and the values to log."""
        g_loss = -self._judge(reconstructions, cond).mean()
        weight = self.disc_weight * _adaptive_weight(nll, g_loss, last_layer)
        return weight * g_loss, {"g_loss": g_loss, "d_weight": weight}

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, active: float, cond: Tensor | None, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss and the values to log."""
        real = self._judge(inputs.detach(), cond)
        fake = self._judge(reconstructions.detach(), cond)
        loss = active * self.disc_loss(real, fake)
        return loss, detached({"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}, split)

    def _judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        if not self.disc_conditional:
            return self.discriminator(images)
        if cond is None:
            raise UserError("disc_conditional is true, but this model has no condition for the loss; set it to false")
        return self.discriminator(torch.cat((images, cond), dim=1))


def _adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: Tensor | None) -> Tensor:
    """Return the ratio of the two terms' gradients on the last layer (equation 7); 1 without gradients."""
    if last_layer is None or not torch.is_grad_enabled():
        return torch.ones_like(g_loss)
    nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
    g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
    return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def detached(values: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Return `values` without gradients, under names with the prefix `split`."""
    return {f"{split}/{name}": value.detach() for name, value in values.items()}
