"""The autoencoder's loss against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.contperceptual import AUTOENCODER, DISCRIMINATOR
from ldm.util import UserError, instantiate_from_config

INPUTS = torch.zeros(2, 3, 16, 16)
POSTERIOR = DiagonalGaussianDistribution(torch.ones(2, 4, 2, 2))
KL = 0.5 * (1.0 + math.e - 1.0 - 1.0) * 2 * 2 * 2  # of N(1, e), over two channels of 2x2


def loss_of(**params: object) -> LPIPSWithDiscriminator:
    torch.manual_seed(0)
    return LPIPSWithDiscriminator(**{"disc_start": 10, "disc_num_layers": 1, "perceptual_weight": 0.0} | params)


def test_reconstruction_and_kl() -> None:
    loss = loss_of(kl_weight=0.1, pixelloss_weight=2.0, logvar_init=0.3)
    value, log = loss(INPUTS, INPUTS + 0.25, POSTERIOR, AUTOENCODER, 0, split="val")
    nll = (2.0 * 0.25 / math.exp(0.3) + 0.3) * 3 * 16 * 16
    assert value.item() == pytest.approx(nll + 0.1 * KL, rel=1e-6)
    assert {
        name: log[f"val/{name}"].item() for name in ("rec_loss", "nll_loss", "kl_loss", "total_loss")
    } == pytest.approx({"rec_loss": 0.25, "nll_loss": nll, "kl_loss": KL, "total_loss": value.item()}, rel=1e-6)


def test_gan_term_starts_at_disc_start_with_the_adaptive_weight() -> None:
    loss = loss_of(disc_factor=0.5, disc_weight=0.8)
    last_layer = torch.nn.Parameter(torch.full((3, 1, 1, 1), 0.1))

    def run(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        reconstructions = torch.nn.functional.conv2d(INPUTS[:, :1] + torch.linspace(0, 1, 16), last_layer)
        return loss(INPUTS, reconstructions, POSTERIOR, AUTOENCODER, step, last_layer=last_layer)

    before, log = run(9)
    assert "train/g_loss" not in log
    after, log = run(10)
    # After the weighting both terms' gradients on the last layer have the same length, but for disc_weight.
    gan_part = log["train/g_loss"] * log["train/d_weight"] * 0.5
    assert (after - before).item() == pytest.approx(gan_part.item(), rel=1e-4)
    total, plain = (torch.autograd.grad(value, last_layer)[0] for value in (after, before))
    assert (total - plain).norm().item() == pytest.approx(0.5 * 0.8 * plain.norm().item(), rel=1e-2)


def test_without_gradients_the_adaptive_weight_is_one() -> None:
    with torch.no_grad():
        _, log = loss_of(disc_weight=0.8)(INPUTS, INPUTS + 0.1, POSTERIOR, AUTOENCODER, 10, last_layer=torch.zeros(1))
    assert log["train/d_weight"].item() == pytest.approx(0.8)


def test_discriminator_sees_detached_images() -> None:
    loss = loss_of()
    reconstructions = (INPUTS + 0.1).requires_grad_()
    value, log = loss(INPUTS, reconstructions, POSTERIOR, DISCRIMINATOR, 10)
    value.backward()
    assert reconstructions.grad is None
    assert all(parameter.grad is not None for parameter in loss.discriminator.parameters())
    assert set(log) == {"train/disc_loss", "train/logits_real", "train/logits_fake"}
    assert loss(INPUTS, reconstructions, POSTERIOR, DISCRIMINATOR, 9)[0].item() == 0.0


def test_conditional_discriminator() -> None:
    loss = loss_of(disc_conditional=True, disc_in_channels=5)
    cond = torch.zeros(2, 2, 16, 16)
    assert loss(INPUTS, INPUTS, POSTERIOR, DISCRIMINATOR, 10, cond=cond)[0].isfinite()
    with pytest.raises(UserError, match="disc_conditional"):
        loss(INPUTS, INPUTS, POSTERIOR, DISCRIMINATOR, 10)


def test_state_dict_keys() -> None:
    loss = loss_of(disc_num_layers=3)
    keys = set(loss.state_dict())
    assert {
        "logvar",
        "discriminator.main.0.weight",
        "discriminator.main.3.running_mean",
        "discriminator.main.11.bias",
    } <= keys
    assert {key.split(".")[0] for key in keys} == {"logvar", "discriminator"}
    assert not loss.logvar.requires_grad


def test_the_config_of_the_published_autoencoders_builds() -> None:
    params = {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5}
    loss = instantiate_from_config({"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": params})
    assert loss.adversarial
    assert not loss_of(disc_factor=0.0).adversarial


def test_bad_options() -> None:
    with pytest.raises(UserError, match="perceptual_weight -1: give a number of at least 0"):
        loss_of(perceptual_weight=-1)
    with pytest.raises(UserError, match="'wasserstein' is unknown; valid: hinge, vanilla"):
        loss_of(disc_loss="wasserstein")


def test_perceptual_weight_of_one_builds_and_needs_weights_to_train() -> None:
    loss = LPIPSWithDiscriminator(disc_start=10)
    assert loss.perceptual_weight == 1.0
    with pytest.raises(UserError, match=r"perceptual_weight 1.0 needs .*params\.perceptual_ckpt.* to 0 there"):
        loss(INPUTS, INPUTS, POSTERIOR, AUTOENCODER, 0)
