"""Network that recognises faces, and the cond stages with it, which condition a model on a face.

The network is a residual one (arXiv:1801.07698) with squeeze and excitation (arXiv:1709.01507), IR-SE50. B: batch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.encoders.clip_image import FrozenCLIPImageEmbedder
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.modules.torch_file import read_torch_file

logger = logging.getLogger(__name__)

_FEATURES = 512  # of a face
_TOKEN = 768  # features of the token that stands for it
_SIDE = 112  # pixels of the face that the network sees
_STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))  # channels and blocks
# Rows and columns of the face in an aligned portrait of 256 pixels.
_ROWS, _COLUMNS = slice(35, 223), slice(32, 220)


class _SqueezeExcite(nn.Module):
    """Scaling of each channel by a factor from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class _Block(nn.Module):
    """Residual block of two convolutions; the second has the stride."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        if channels == out:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            _SqueezeExcite(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class FaceNetwork(nn.Module):
    """IR-SE50: faces (B, 3, 112, 112) in [-1, 1] → unit vectors (B, 512), under the keys of `model_ir_se50.pth`."""

    def __init__(self) -> None:
        super().__init__()
        first = _STAGES[0][0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )
        blocks, channels = [], first
        for out, count in _STAGES:
            blocks += [_Block(channels if i == 0 else out, out, 2 if i == 0 else 1) for i in range(count)]
            channels = out
        self.body = nn.Sequential(*blocks)
        cells = (_SIDE // 2 ** len(_STAGES)) ** 2
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(channels * cells, _FEATURES),
            nn.BatchNorm1d(_FEATURES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.output_layer(self.body(self.input_layer(x))))


class IDFeatures(nn.Module):
    """Frozen `FaceNetwork` of aligned portraits of any size.

    Args:
        model_path: its weights. If there is no such file, they must come with the checkpoint.
    """

    def __init__(self, model_path: str | None = None) -> None:
        super().__init__()
        self.facenet = FaceNetwork()
        if model_path is not None and Path(model_path).is_file():
            _load(self.facenet, model_path)
        else:
            logger.warning(
                "model_path %s: no such file; the weights of the face network must come with the checkpoint", model_path
            )
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> IDFeatures:
        return super().train(False)  # its batch norms keep their statistics

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the unit vectors (B, 512) of portraits (B, 3, H, W) in [-1, 1]."""
        face = F.interpolate(x.float(), (256, 256), mode="area")[:, :, _ROWS, _COLUMNS]
        return self.facenet(F.adaptive_avg_pool2d(face, _SIDE).to(self.facenet.input_layer[0].weight.dtype))


def _load(network: FaceNetwork, path: str) -> None:
    read_torch_file(path, network.load_state_dict, f"model_path {path!r}: not the weights of IR-SE50")


class FrozenFaceEncoder(AbstractEncoder):
    """Encoder of a portrait to one token: the frozen face network, and a linear layer, which may train.

    Args:
        model_path: see `IDFeatures`.
        augment: mirror half of the training samples.
    """

    def __init__(self, model_path: str | None = None, augment: bool = False) -> None:
        super().__init__()
        self.loss_fn = IDFeatures(model_path)
        self.mapper = nn.Linear(_FEATURES, _TOKEN)
        self.augment = augment

    def forward(self, img: Tensor | list[Any]) -> Tensor:
        """Encode portraits (B, 3, H, W) in [-1, 1] to (B, 768), and a list to zeros (len, 768)."""
        if isinstance(img, list):
            return self.mapper.weight.new_zeros(len(img), _TOKEN)
        if self.augment and self.training:
            mirrored = torch.rand(len(img), 1, 1, 1, device=img.device) < 0.5
            img = torch.where(mirrored, img.flip(-1), img)
        return self.mapper(self.loss_fn(img).to(self.mapper.weight.dtype))

    def encode(self, img: Tensor | list[Any]) -> Tensor:
        """Encode portraits (B, 3, H, W) in [-1, 1] to (B, 1, 768), and a list to zeros (len, 1, 768)."""
        return self(img)[:, None]


class FaceIdClipEncoder(AbstractEncoder):
    """Encoder of a portrait (B, 3, 512, 512) in [-1, 1] to two tokens: the face, and the image without the face.

    Args:
        model_path: see `IDFeatures`.
    """

    _HIDDEN_ROWS, _HIDDEN_COLUMNS = slice(184, 452), slice(122, 396)

    def __init__(self, model_path: str | None = None) -> None:
        super().__init__()
        self.encoder = FrozenCLIPImageEmbedder().requires_grad_(False)
        self.id = FrozenFaceEncoder(model_path, augment=True)

    def forward(self, img: Tensor | list[Any]) -> Tensor:
        """Encode images to (B, 2, 768), and a list to zeros (len, 2, 768)."""
        if isinstance(img, list):
            return self.encoder.encode(img).expand(-1, 2, -1)
        rest = img.clone()
        rest[:, :, self._HIDDEN_ROWS, self._HIDDEN_COLUMNS] = 0
        with torch.no_grad():
            surroundings = self.encoder.encode(rest)
        return torch.cat([self.id.encode(img), surroundings], dim=1)
