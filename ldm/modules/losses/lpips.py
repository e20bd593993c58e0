"""Perceptual distance: LPIPS version 0.1 on VGG16 (arXiv:1801.03924, arXiv:1409.1556).

The `lpips` package needs torchvision and downloads weights. This module therefore builds the network without weights;
see `ldm.models.lpips_weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Channels of VGG16's convolutions per stage. Each stage except the first begins with max pooling.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and standard deviation of ImageNet's channels, for images in [-1, 1].
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distance (B, 1, 1, 1) of images (B, 3, H, W) in [-1, 1], frozen, under the keys of the public VQGANs."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _Vgg16()
        for index, stage in enumerate(_STAGES):
            self.add_module(f"lin{index}", _Weights(stage[-1]))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        ours, theirs = (self.net(self.scaling_layer(images)) for images in (input, target))
        distance = 0.0
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            difference = (_unit(a) - _unit(b)).square()  # B C h w
            distance = distance + self.get_submodule(f"lin{index}")(difference).mean((2, 3), keepdim=True)
        return distance


def _unit(features: Tensor) -> Tensor:
    """Return features (B, C, h, w) with length 1 over the channels."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


class _Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(_MEAN)[None, :, None, None])
        self.register_buffer("scale", torch.tensor(_STD)[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Weights(nn.Module):
    """Learned weight of each channel: a 1×1 convolution. Its dropout only acts while these weights are learned."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Vgg16(nn.Module):
    """VGG16's convolutions in five slices. The layers keep their numbers from the whole network."""

    def __init__(self) -> None:
        super().__init__()
        number, width = 0, 3
        for index, stage in enumerate(_STAGES):
            layers = nn.Sequential()
            if index:
                layers.add_module(str(number), nn.MaxPool2d(2))
                number += 1
            for channels in stage:
                layers.add_module(str(number), nn.Conv2d(width, channels, 3, padding=1))
                layers.add_module(str(number + 1), nn.ReLU())
                number, width = number + 2, channels
            self.add_module(f"slice{index + 1}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features after the last ReLU of each stage."""
        features = []
        for layers in self.children():
            x = layers(x)
            features.append(x)
        return features
