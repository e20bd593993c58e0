"""Training loss of the autoencoder with a codebook (VQGAN, arXiv:2012.09841, equations 4 and 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ldm.modules.losses.adversarial import DISCRIMINATOR, AdversarialLoss, detached
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.util import refuse_if

__all__ = ["DummyLoss", "Quantized", "VQLPIPSWithDiscriminator"]


class Quantized(NamedTuple):
    """Results of the quantizer for a batch."""

    codebook_loss: Tensor  # scalar
    indices: Tensor  # of the codebook entries, one per latent pixel


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Weighted sum of reconstruction error, codebook loss and, from `disc_start` on, a GAN term.

    Args:
        disc_start: see `AdversarialLoss`, also for the arguments that are not listed here.
        codebook_weight: weight of the codebook loss.
        n_classes: number of codebook entries, used to log perplexity and usage.
        perceptual_loss, pixel_loss: only `lpips` and `l1` are valid.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        **kwargs: Any,
    ) -> None:
        refuse_if(
            (perceptual_loss, pixel_loss) != ("lpips", "l1"),
            f"perceptual_loss {perceptual_loss!r}, pixel_loss {pixel_loss!r}: give 'lpips' and 'l1'",
        )
        super().__init__(disc_start, **kwargs)
        self.codebook_weight = codebook_weight
        self.n_classes = n_classes

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        quantized: Quantized,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the autoencoder or the discriminator; see `LPIPSWithDiscriminator`."""
        active = self.active(global_step)
        if optimizer_idx == DISCRIMINATOR:
            return self.discriminator_loss(inputs, reconstructions, active, cond, split)
        error, log = self.error(inputs, reconstructions)
        nll, codebook_loss = error.mean(), quantized.codebook_loss.mean()
        loss = nll + self.codebook_weight * codebook_loss
        log |= {"rec_loss": nll, "nll_loss": nll, "quant_loss": codebook_loss}
        if active:
            term, logged = self.gan_term(nll, reconstructions, last_layer, cond)
            loss = loss + active * term
            log |= logged
        if self.n_classes is not None:
            log |= _usage(quantized.indices, self.n_classes)
        return loss, detached({"total_loss": loss, **log}, split)


def _usage(indices: Tensor, entries: int) -> dict[str, Tensor]:
    """Return the perplexity of the codebook's use (exp of its entropy) and the number of entries used."""
    share = F.one_hot(indices.flatten(), entries).float().mean(0)
    perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
    return {"perplexity": perplexity, "cluster_usage": (share > 0).sum().float()}
