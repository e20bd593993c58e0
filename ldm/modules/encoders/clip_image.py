"""CLIP's image towers (arXiv:2103.00020): an image to one vector, which conditions a model in the place of text.

B batch, N patches, D features of the tower, E features of the embedding that it shares with captions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.encoders.base import AbstractEncoder
from ldm.modules.encoders.clip_blocks import ClipTransformer
from ldm.modules.encoders.open_clip import OpenClipText, text_config_of
from ldm.util import UserError, nearest

_SIDE = 224  # pixels, that images are resized to
# The means and standard deviations of the images that CLIP was trained on, in [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# arch → width, heads, layers, patch, width of the linear layers, embed_dim of the image tower.
_ARCHS = {
    "ViT-B-32": (768, 12, 12, 32, 3072, 512),
    "ViT-B-16": (768, 12, 12, 16, 3072, 512),
    "ViT-L-14": (1024, 16, 24, 14, 4096, 768),
    "ViT-H-14": (1280, 16, 32, 14, 5120, 1024),
    "ViT-g-14": (1408, 16, 40, 14, 6144, 1024),
    "ViT-bigG-14": (1664, 16, 48, 14, 8192, 1280),
}


class VisionTower(nn.Module):
    """A vision transformer (B, 3, side, side) → (B, E), under OpenAI's and OpenCLIP's state-dict keys."""

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        patch: int,
        mlp_width: int,
        embed_dim: int,
        side: int = _SIDE,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((side // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = ClipTransformer(width, heads, layers, False, quick_gelu, mlp_width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x.to(self.conv1.weight.dtype)).flatten(2).mT  # (B, N, D)
        first = self.class_embedding.to(patches.dtype).expand(len(x), 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        states = self.transformer(self.ln_pre(tokens))
        return self.ln_post(states[:, 0]) @ self.proj.to(patches.dtype)


class _ImageEmbedder(AbstractEncoder):
    """Images in [-1, 1], any size, to the vectors of a vision tower, `model.visual`."""

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias
        self.model = nn.Module()
        for name, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize images (B, 3, H, W) in [-1, 1] to the tower's size, and normalise them as its training images."""
        # Torch's own antialiasing, which knows no aligned corners.
        corners = {"antialias": True} if self.antialias else {"align_corners": True}
        x = F.interpolate(x.float(), (_SIDE, _SIDE), mode="bicubic", **corners)
        return ((x + 1) / 2 - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, E)."""
        return self.model.visual(self.preprocess(x)).float()


class FrozenClipImageEmbedder(_ImageEmbedder):
    """CLIP's image tower: images in [-1, 1] -> (B, E). State-dict keys are those of the whole CLIP, `model.*`.

    Built from its name's sizes; weights come with the checkpoint, nothing is ever downloaded.

    Args:
        model: a name of OpenAI's, such as `ViT-L/14`.
        jit: accepted for old configs if false.
        device: where to put the module; None leaves it where it is built.
        antialias: smooth images that are made smaller, by torch's own resize.

    Raises:
        UserError: an unknown name, or `jit`.
    """

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str | torch.device | None = None,
        antialias: bool = False,
    ) -> None:
        super().__init__(antialias)
        arch = model.replace("/", "-")
        if arch not in _ARCHS:
            raise UserError(f"model {model!r} is unknown{nearest(arch, set(_ARCHS))}")
        if jit:
            raise UserError("jit: true would load a compiled file; leave it out")
        self._build(arch)
        self.put_on(device)

    def _build(self, arch: str) -> None:
        # The text half is part of the released keys, in OpenAI's layout at the top of the model.
        self.model = OpenClipText(**text_config_of(arch, "openai", None))
        self.model.visual = VisionTower(*_ARCHS[arch], quick_gelu=True)


class FrozenCLIPImageEmbedder(FrozenClipImageEmbedder):
    """CLIP's image tower as a context of one token: `encode` gives (B, 1, E).

    State-dict keys lack the blocks of the text half. Where samples drop their image, a list stands in its place, and
    the context is zero.
    """

    def _build(self, arch: str) -> None:
        super()._build(arch)
        del self.model.transformer

    def forward(self, x: Tensor | list[Any]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, E); a list -> zeros (len, E)."""
        if isinstance(x, list):
            return self.mean.new_zeros(len(x), self.model.visual.proj.shape[1])
        return super().forward(x)

    def encode(self, x: Tensor | list[Any]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, 1, E)."""
        return self(x)[:, None]


class FaceClipEncoder(AbstractEncoder):
    """A portrait (B, 3, 512, 512) in [-1, 1] as a context of two tokens: its face, and all except the face.

    The face is where aligned portraits have it.

    Args:
        augment: mirror the face in training, half of the time.
        retreival_key: the image holds two, in its channels: the first gives the surroundings, the second the face.
    """

    _ROWS, _COLUMNS = slice(190, 440), slice(125, 387)

    def __init__(self, augment: bool = True, retreival_key: str | None = None) -> None:
        super().__init__()
        self.encoder = FrozenCLIPImageEmbedder()
        self.augment = augment
        self.retreival_key = retreival_key

    def forward(self, img: Tensor | list[Any]) -> Tensor:
        """Images -> (B, 2, E); a list -> zeros (len, 2, E)."""
        if isinstance(img, list):
            return self.encoder.encode(img).expand(-1, 2, -1)
        second = img[:, 3:] if self.retreival_key else img
        face, rest = second[:, :, self._ROWS, self._COLUMNS], img[:, :3].clone()
        rest[:, :, self._ROWS, self._COLUMNS] = 0
        if self.augment and self.training:
            mirrored = torch.rand(len(face), 1, 1, 1, device=face.device) < 0.5
            face = torch.where(mirrored, face.flip(-1), face)
        return torch.cat([self.encoder.encode(face), self.encoder.encode(rest)], dim=1)


class FrozenOpenCLIPImageEmbedder(_ImageEmbedder):
    """OpenCLIP's image tower: images in [-1, 1] -> (B, E), by which Stable unCLIP is conditioned.

    State-dict keys are those of the whole model without the text blocks, `model.*`. Built from its arch's sizes;
    weights come with the checkpoint, nothing is ever downloaded.

    Args:
        arch: a name of OpenCLIP's, such as `ViT-H-14`.
        version: where released weights came from, a note; `openai` means OpenAI's activation.
        device: where to put the module; None leaves it where it is built.
        max_length: accepted for old configs.
        freeze: set evaluation mode, and no gradients.
        antialias: smooth images that are made smaller, by torch's own resize.
        ucg_rate: share of the embeddings that training zeroes.

    Raises:
        UserError: an unknown `arch`.
    """

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str | torch.device | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "pooled",
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ) -> None:
        super().__init__(antialias)
        if arch not in _ARCHS:
            raise UserError(f"arch {arch!r} is unknown{nearest(arch, set(_ARCHS))}")
        if layer != "pooled":
            raise UserError(f"layer {layer!r}: an image tower gives 'pooled' alone")
        self.ucg_rate = ucg_rate
        self.model = OpenClipText(**text_config_of(arch, version, None))
        del self.model.transformer
        self.model.visual = VisionTower(*_ARCHS[arch], quick_gelu=version == "openai")
        self.put_on(device)
        if freeze:
            self.freeze()

    def forward(self, x: Tensor, no_dropout: bool = False) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, E)."""
        z = super().forward(x)
        if self.ucg_rate and self.training and not no_dropout:
            z = z * (torch.rand(len(z), 1, device=z.device) >= self.ucg_rate)
        return z
