"""The training loss of the KL autoencoder: reconstruction, KL divergence and an optional GAN term.

Rombach et al., arXiv:2112.10752, equation 25; the GAN term and its adaptive weight are those of VQGAN,
arXiv:2012.09841, equations 6 and 7.
"""

from __future__ import annotations

import torch
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.discriminator import PatchDiscriminator, hinge_loss, vanilla_loss
from ldm.util import UserError

_DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}

AUTOENCODER, DISCRIMINATOR = 0, 1  # the two values of `optimizer_idx`


class LPIPSWithDiscriminator(nn.Module):
    """Weighted sum of reconstruction error, KL divergence and, from `disc_start` on, a GAN term.

    The name is the public one. The perceptual (LPIPS) term needs network weights that this project does not ship,
    so its weight must be 0, which is the default: a config that names no `perceptual_weight` trains without the term.

    Args:
        disc_start: autoencoder step from which the GAN term counts.
        logvar_init: log-variance of the reconstruction error; stored with the weights, but not trained.
        kl_weight: weight of the KL divergence, in nats an image.
        pixelloss_weight: weight of the absolute error, summed over an image.
        disc_factor: weight of the GAN term for both players; 0 turns it off, and `adversarial` is then False.
        disc_weight: weight of the autoencoder's GAN term, besides the adaptive one.
        disc_conditional: the discriminator sees `cond` beside the image, stacked on the channels.
        disc_loss: 'hinge' or 'vanilla'.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
    ) -> None:
        super().__init__()
        if perceptual_weight > 0:
            raise UserError(
                f"perceptual_weight {perceptual_weight} needs LPIPS network weights, which are not available; "
                "set perceptual_weight to 0 in the params of lossconfig"
            )
        if disc_loss not in _DISCRIMINATOR_LOSSES:
            raise UserError(f"disc_loss {disc_loss!r} is not one of {', '.join(_DISCRIMINATOR_LOSSES)}")
        self.disc_start = disc_start
        self.kl_weight = kl_weight
        self.pixelloss_weight = pixelloss_weight
        self.disc_factor = disc_factor
        self.disc_weight = disc_weight
        self.disc_conditional = disc_conditional
        self.disc_loss = _DISCRIMINATOR_LOSSES[disc_loss]
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=False)
        self.discriminator = PatchDiscriminator(disc_in_channels, disc_num_layers, use_actnorm=use_actnorm)

    @property
    def adversarial(self) -> bool:
        """Whether the GAN term is ever on, and the discriminator so needs an optimizer."""
        return self.disc_factor > 0

    def forward(
        self,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: torch.Tensor | None = None,
        cond: torch.Tensor | None = None,
        split: str = "train",
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar loss of the autoencoder (`optimizer_idx` 0) or the discriminator (1), and what to log.

        Args:
            inputs, reconstructions: images (B, C, H, W).
            global_step: autoencoder steps taken so far.
            last_layer: the decoder's last weight, where the adaptive weight compares gradients; without it that is 1.
            split: what the names of the logged values start with.
        """
        active = self.disc_factor if global_step >= self.disc_start else 0.0
        if optimizer_idx == DISCRIMINATOR:
            return self._discriminator_loss(inputs, reconstructions, active, cond, split)
        return self._autoencoder_loss(inputs, reconstructions, posteriors, active, last_layer, cond, split)

    def _autoencoder_loss(
        self,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        posteriors: DiagonalGaussianDistribution,
        active: float,
        last_layer: torch.Tensor | None,
        cond: torch.Tensor | None,
        split: str,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch_size = inputs.shape[0]
        error = (inputs - reconstructions).abs()
        # A Laplace likelihood of scale e^logvar, up to a constant, summed over each image.
        nll = (self.pixelloss_weight * error * torch.exp(-self.logvar) + self.logvar).sum() / batch_size
        kl = posteriors.kl().sum() / batch_size
        loss = nll + self.kl_weight * kl
        log = {"rec_loss": error.mean(), "nll_loss": nll, "kl_loss": kl, "logvar": self.logvar}
        if active:
            g_loss = -self._judge(reconstructions, cond).mean()
            weight = self.disc_weight * self._adaptive_weight(nll, g_loss, last_layer)
            loss = loss + active * weight * g_loss
            log |= {"g_loss": g_loss, "d_weight": weight}
        return loss, _detached({"total_loss": loss, **log}, split)

    def _discriminator_loss(
        self,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        active: float,
        cond: torch.Tensor | None,
        split: str,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        real = self._judge(inputs.detach(), cond)
        fake = self._judge(reconstructions.detach(), cond)
        loss = active * self.disc_loss(real, fake)
        return loss, _detached({"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}, split)

    def _judge(self, images: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        if not self.disc_conditional:
            return self.discriminator(images)
        if cond is None:
            raise UserError("disc_conditional is true, but this model gives the loss no condition; set it to false")
        return self.discriminator(torch.cat((images, cond), dim=1))

    @staticmethod
    def _adaptive_weight(nll: torch.Tensor, g_loss: torch.Tensor, last_layer: torch.Tensor | None) -> torch.Tensor:
        """Ratio of the two terms' gradients on the last layer (VQGAN, equation 7); 1 where there are no gradients."""
        if last_layer is None or not torch.is_grad_enabled():
            return torch.ones_like(g_loss)
        nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
        return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def _detached(values: dict[str, torch.Tensor], split: str) -> dict[str, torch.Tensor]:
    return {f"{split}/{name}": value.detach() for name, value in values.items()}
