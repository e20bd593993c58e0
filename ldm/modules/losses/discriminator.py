"""Patch discriminator of the first stage's GAN term (pix2pix, arXiv:1611.07004, section 3.2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_LEAK = 0.2  # slope of the leaky ReLUs, pix2pix section 6.1


class ActNorm(nn.Module):
    """Affine map per channel, initialised for mean 0 and variance 1 of its first batch (Glow, arXiv:1807.03039)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def _initialize(self, x: torch.Tensor) -> None:
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        self.loc.copy_(-mean)
        self.scale.copy_(1.0 / (std + 1e-6))
        self.initialized.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.initialized:
            self._initialize(x)
        return self.scale * (x + self.loc)


def _weights_init(module: nn.Module) -> None:
    """Initialise weights as Gaussian with standard deviation 0.02 (pix2pix, section 6.2)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class PatchDiscriminator(nn.Module):
    """Discriminator (B, in_channels, H, W) -> (B, 1, h, w) with one logit per patch, high for real images.

    `num_layers` strided 4x4 convolutions set the size of a patch: 3 give the 70x70 pixels of pix2pix.
    """

    def __init__(
        self, in_channels: int = 3, num_layers: int = 3, channels: int = 64, use_actnorm: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(_LEAK)]
        width = channels
        for i in range(1, num_layers + 1):
            previous, width = width, channels * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                # A batch norm brings its own bias.
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=use_actnorm),
                ActNorm(width) if use_actnorm else nn.BatchNorm2d(width),
                nn.LeakyReLU(_LEAK),
            ]
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_weights_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the mean hinge loss of the logits on real and on fake images (Lim & Ye, arXiv:1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the logits on real and on fake images (Goodfellow et al., arXiv:1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
