"""CLIP's image towers (arXiv:2103.00020), which encode an image to one vector. It conditions a model in place of text.

B: batch. N: patches. D: features of the tower. E: features of the embedding that images share with captions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.encoders.clip_blocks import ClipTransformer
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.modules.encoders.open_clip import OpenClipText, text_config_of
from ldm.util import check_choice, refuse_if

_SIDE = 224  # pixels; images are resized to this height and width
# Means and standard deviations of CLIP's training images, in [0, 1].
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


def drop_embeddings(z: Tensor, share: float) -> Tensor:
    """Return z (B, E) with a `share` of the rows set to 0."""
    return z * (torch.rand(len(z), 1, device=z.device) >= share) if share else z


class VisionTower(nn.Module):
    """Vision transformer (B, 3, side, side) → (B, E), under OpenAI's and OpenCLIP's state-dict keys."""

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
    """Embedder of images in [-1, 1] of any size by a vision tower, `model.visual`."""

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias
        self.model = nn.Module()
        for name, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize images (B, 3, H, W) in [-1, 1] to the tower's size and normalise them like its training images."""
        # torch's own antialiasing, which does not support aligned corners
        corners = {"antialias": True} if self.antialias else {"align_corners": True}
        x = F.interpolate(x.float(), (_SIDE, _SIDE), mode="bicubic", **corners)
        return ((x + 1) / 2 - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, E)."""
        return self.model.visual(self.preprocess(x)).float()


class FrozenClipImageEmbedder(_ImageEmbedder):
    """CLIP's image tower: images in [-1, 1] -> (B, E). State-dict keys are those of the whole CLIP, `model.*`.

    The sizes follow from `model`. The weights come with the checkpoint, and nothing is ever downloaded.

    Args:
        model: name of a model of OpenAI, such as `ViT-L/14`.
        jit: accepted for old configs if false.
        device: device of the module; None leaves it on the device where it is built.
        antialias: smooth images that become smaller, with torch's own resize.

    Raises:
        UserError: the name is unknown, or `jit` is true.
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
        check_choice("model", arch, tuple(_ARCHS))
        refuse_if(jit, "jit: true would load a compiled file; leave it out")
        self._build(arch)
        self.put_on(device)

    def _build(self, arch: str) -> None:
        # The released keys include the text half, in OpenAI's layout at the top of the model.
        self.model = OpenClipText(**text_config_of(arch, "openai", None))
        self.model.visual = VisionTower(*_ARCHS[arch], quick_gelu=True)


class FrozenCLIPImageEmbedder(FrozenClipImageEmbedder):
    """CLIP's image tower as a context of one token: `encode` returns (B, 1, E).

    State-dict keys lack the blocks of the text half. For samples without an image the input is a list, and the context
    is zero.
    """

    def _build(self, arch: str) -> None:
        super()._build(arch)
        del self.model.transformer

    def forward(self, x: Tensor | list[Any]) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, E). A list (samples without an image) gives zeros (len, E)."""
        if isinstance(x, list):
            return self.mean.new_zeros(len(x), self.model.visual.proj.shape[1])
        return super().forward(x)

    def encode(self, x: Tensor | list[Any]) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, 1, E)."""
        return self(x)[:, None]


class ClipImageEmbedder(FrozenClipImageEmbedder):
    """CLIP's image tower that conditions Stable unCLIP: images in [-1, 1] -> (B, E).

    Args:
        ucg_rate: share of embeddings that training sets to zero. The others are those of the base class.
    """

    def __init__(
        self,
        model: str = "ViT-L/14",
        jit: bool = False,
        device: str | torch.device | None = None,
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ) -> None:
        super().__init__(model, jit, device, antialias)
        self.ucg_rate = ucg_rate

    def forward(self, x: Tensor, no_dropout: bool = False) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, E)."""
        return drop_embeddings(super().forward(x), self.ucg_rate if self.training and not no_dropout else 0.0)


class FaceClipEncoder(AbstractEncoder):
    """Encoder of a portrait (B, 3, 512, 512) in [-1, 1] to two tokens: the face, and the image without the face.

    The face is expected at its position in aligned portraits.

    Args:
        augment: mirror the face in half of the training samples.
        retreival_key: take two images stacked along the channels; the first gives the surroundings, the second
            the face.
    """

    _ROWS, _COLUMNS = slice(190, 440), slice(125, 387)

    def __init__(self, augment: bool = True, retreival_key: str | None = None) -> None:
        super().__init__()
        self.encoder = FrozenCLIPImageEmbedder()
        self.augment = augment
        self.retreival_key = retreival_key

    def forward(self, img: Tensor | list[Any]) -> Tensor:
        """Encode images to (B, 2, E), and a list to zeros (len, 2, E)."""
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
    """OpenCLIP's image tower, which conditions Stable unCLIP: images in [-1, 1] -> (B, E).

    State-dict keys are those of the whole model without the text blocks, `model.*`. The sizes follow from `arch`. The
    weights come with the checkpoint, and nothing is ever downloaded.

    Args:
        arch: name of an OpenCLIP model, such as `ViT-H-14`.
        version: name of the released weights. Only `openai` has an effect: it selects OpenAI's activation.
        device: device of the module; None leaves it on the device where it is built.
        max_length: accepted for old configs.
        freeze: set evaluation mode and turn gradients off.
        antialias: smooth images that become smaller, with torch's own resize.
        ucg_rate: share of embeddings that training sets to zero.

    Raises:
        UserError: `arch` or `layer` is unknown.
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
        check_choice("arch", arch, tuple(_ARCHS))
        check_choice("layer", layer, ("pooled",))
        self.ucg_rate = ucg_rate
        self.model = OpenClipText(**text_config_of(arch, version, None))
        del self.model.transformer
        self.model.visual = VisionTower(*_ARCHS[arch], quick_gelu=version == "openai")
        self.put_on(device)
        if freeze:
            self.freeze()

    def forward(self, x: Tensor, no_dropout: bool = False) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, E)."""
        return drop_embeddings(super().forward(x), self.ucg_rate if self.training and not no_dropout else 0.0)
