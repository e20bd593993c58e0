"""The patch discriminator and its losses."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.modules.losses.discriminator import ActNorm, PatchDiscriminator, hinge_loss, vanilla_loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("num_layers", "size"), [(1, 30), (2, 14), (3, 6)])
def test_one_logit_a_patch(num_layers: int, size: int) -> None:
    discriminator = PatchDiscriminator(num_layers=num_layers, channels=8)
    assert discriminator(torch.randn(2, 3, 64, 64)).shape == (2, 1, size, size)


def test_receptive_field_is_70_pixels() -> None:
    discriminator = PatchDiscriminator(channels=8).eval()  # no batch statistics, which would see the whole image
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(image)
    logits[0, 0, 7, 7].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_actnorm_normalizes_its_first_batch_and_then_stays() -> None:
    layer = ActNorm(4)
    first = layer(5.0 + 3.0 * torch.randn(8, 4, 16, 16))
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(first.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    before = layer.loc.clone()
    layer(torch.randn(8, 4, 16, 16))
    assert torch.equal(layer.loc, before)


def test_discriminator_with_actnorm_runs() -> None:
    assert PatchDiscriminator(channels=8, use_actnorm=True)(torch.randn(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 1.0 / 2))
    terms = [math.log1p(math.exp(value)) for value in (-2.0, -0.5, -3.0, 0.0)]
    assert vanilla_loss(real, fake).item() == pytest.approx(0.5 * (sum(terms[:2]) / 2 + sum(terms[2:]) / 2))
