"""Training loss of the KL autoencoder: reconstruction, KL divergence and an optional GAN term.

Rombach et al., arXiv:2112.10752, equation 25.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AUTOENCODER, DISCRIMINATOR, AdversarialLoss, detached

__all__ = ["AUTOENCODER", "DISCRIMINATOR", "DummyLoss", "LPIPSWithDiscriminator"]


class DummyLoss(nn.Identity):
    """Placeholder for the loss of an autoencoder that stays frozen, as `torch.nn.Identity` is."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """Weighted sum of reconstruction error, KL divergence and, from `disc_start` on, a GAN term.

    Args:
        disc_start: see `AdversarialLoss`, also for the arguments that are not listed here.
        logvar_init: log-variance of the reconstruction error; stored with the weights, but not trained.
        kl_weight: weight of the KL divergence, in nats per image.
    """

    def __init__(self, disc_start: int, logvar_init: float = 0.0, kl_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(disc_start, **kwargs)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=False)

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of the autoencoder (`optimizer_idx` 0) or discriminator (1), and the values to log.

        Args:
            inputs, reconstructions: images (B, C, H, W).
            global_step: autoencoder steps so far.
            last_layer: last weight of the decoder, for the adaptive weight's gradients; None sets that weight to 1.
            split: prefix of the names of the logged values.
        """
        active = self.active(global_step)
        if optimizer_idx == DISCRIMINATOR:
            return self.discriminator_loss(inputs, reconstructions, active, cond, split)
        batch_size = inputs.shape[0]
        error, log = self.error(inputs, reconstructions)
        # A Laplace likelihood of scale e^logvar, up to a constant, summed over each image.
        nll = (error * torch.exp(-self.logvar) + self.logvar).sum() / batch_size
        kl = posteriors.kl().sum() / batch_size
        loss = nll + self.kl_weight * kl
        rec_loss = (inputs - reconstructions).abs().mean()
        log |= {"rec_loss": rec_loss, "nll_loss": nll, "kl_loss": kl, "logvar": self.logvar}
        if active:
            term, logged = self.gan_term(nll, reconstructions, last_layer, cond)
            loss = loss + active * term
            log |= logged
        return loss, detached({"total_loss": loss, **log}, split)
