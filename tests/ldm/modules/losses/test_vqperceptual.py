"""The loss of autoencoders with a codebook against values computed by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ldm.modules.losses import VQLPIPSWithDiscriminator
from ldm.modules.losses.adversarial import AUTOENCODER, DISCRIMINATOR
from ldm.util import UserError

INPUTS = torch.zeros(2, 3, 16, 16)
QUANTIZED = SimpleNamespace(codebook_loss=torch.tensor(0.3), indices=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))


def loss_of(**params: object) -> VQLPIPSWithDiscriminator:
    torch.manual_seed(0)
    return VQLPIPSWithDiscriminator(**{"disc_start": 10, "disc_num_layers": 1, "perceptual_weight": 0.0} | params)


def test_vqperceptual_reconstruction_and_codebook() -> None:
    value, log = loss_of(codebook_weight=2.0)(INPUTS, INPUTS + 0.25, QUANTIZED, AUTOENCODER, 0, split="val")
    assert value.item() == pytest.approx(0.25 + 2 * 0.3)
    assert {name: log[f"val/{name}"].item() for name in ("rec_loss", "quant_loss", "total_loss")} == pytest.approx(
        {"rec_loss": 0.25, "quant_loss": 0.3, "total_loss": 0.85}
    )


def test_vqperceptual_gan_term_starts_at_disc_start() -> None:
    loss = loss_of(disc_weight=0.8)
    before, _ = loss(INPUTS, INPUTS + 0.1, QUANTIZED, AUTOENCODER, 9)
    with torch.no_grad():
        after, log = loss(INPUTS, INPUTS + 0.1, QUANTIZED, AUTOENCODER, 10)
    assert (after - before).item() == pytest.approx(0.8 * log["train/g_loss"].item(), rel=1e-5)
    assert loss(INPUTS, INPUTS, QUANTIZED, DISCRIMINATOR, 10)[0].item() > 0


def test_vqperceptual_logs_the_use_of_the_codebook() -> None:
    """Four of eight entries, equally often: a perplexity of 4."""
    _, log = loss_of(n_classes=8)(INPUTS, INPUTS, QUANTIZED, AUTOENCODER, 0)
    assert log["train/perplexity"].item() == pytest.approx(4, rel=1e-4)
    assert log["train/cluster_usage"].item() == 4


def test_vqperceptual_of_another_error() -> None:
    with pytest.raises(UserError, match="give 'lpips' and 'l1'"):
        loss_of(pixel_loss="l2")
