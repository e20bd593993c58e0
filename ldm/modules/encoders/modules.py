"""Cond stages: what turns a batch entry (captions, class labels, stored embeddings) into the UNet's conditioning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.util import UserError, nearest

logger = logging.getLogger(__name__)

# The text tower of CLIP ViT-L/14 (arXiv:2103.00020, table 20), with which Stable Diffusion v1 reads captions.
_CLIP_L14 = "openai/clip-vit-large-patch14"
_CLIP_L14_TEXT = {
    "vocab_size": 49_408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}


class AbstractEncoder(nn.Module):
    """What a cond stage is: `encode` gives the conditioning of a batch, by default as calling the module does."""

    def encode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self(*args, **kwargs)

    def freeze(self) -> None:
        """Evaluation mode, and no gradients for the parameters."""
        self.eval()
        self.requires_grad_(False)


class DummyEncoder(AbstractEncoder):
    """No encoder: the batch entry `key` holds the conditioning itself, such as stored text embeddings (B, 77, D)."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, batch: Mapping[str, torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """`batch[key]`; a tensor is passed through."""
        return _entry(batch, self.key)


class ClassEmbedder(AbstractEncoder):
    """A learned vector for each of `n_classes` labels; labels are the batch entry `key`."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, torch.Tensor] | torch.Tensor, key: str | None = None) -> torch.Tensor:
        """Labels (B,), given or in the batch -> (B, 1, embed_dim)."""
        return self.embedding(_entry(batch, key or self.key)[:, None])


def _entry(batch: Mapping[str, torch.Tensor] | torch.Tensor, key: str) -> torch.Tensor:
    if isinstance(batch, torch.Tensor):
        return batch
    if key not in batch:
        raise UserError(f"key {key!r} of the cond stage is not in the batch, which has {', '.join(map(str, batch))}")
    return batch[key]


class FrozenCLIPEmbedder(AbstractEncoder):
    """CLIP's text tower: captions -> the hidden states of the last layer, after the final layer norm.

    Built from its config; weights come with the checkpoint, nothing is ever downloaded. State-dict keys are the
    released ones, `transformer.text_model.*`; the `position_ids` that some releases carry is ignored.

    Args:
        version: only the name that released configs give is known.
        device: where to put the module; None leaves it where it is built. Ids follow the parameters' device.
        max_length: ids a caption, start and end included; at most `max_position_embeddings`.
        text_config: entries of transformers' `CLIPTextConfig` that differ from those of ViT-L/14.

    Raises:
        UserError: unknown `version` or `text_config` key, a `max_length` or a vocabulary that does not fit.
    """

    def __init__(
        self,
        version: str = _CLIP_L14,
        device: str | torch.device | None = None,
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if version != _CLIP_L14:
            raise UserError(f"version {version!r} is not known; use {_CLIP_L14!r}, with text_config for another size")
        self.max_length = max_length
        self.tokenizer = ClipTokenizer(max_length)
        self.transformer = _TextTransformer({**_CLIP_L14_TEXT, **(text_config or {})})
        positions, vocabulary = self.transformer.positions, self.transformer.vocabulary
        if max_length > positions:
            raise UserError(f"max_length {max_length} exceeds max_position_embeddings {positions} of the text tower")
        if vocabulary < len(self.tokenizer):
            raise UserError(f"vocab_size {vocabulary} in text_config must be at least {len(self.tokenizer)}, as CLIP's")
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            logger.warning("device %s of the text tower: there is no CUDA here; it stays on the CPU", device)
        elif device is not None:
            self.to(device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Captions -> ids (B, max_length) on the CPU."""
        return self.tokenizer([texts] if isinstance(texts, str) else texts)

    def forward(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Captions -> (B, max_length, hidden_size)."""
        # A few kilobytes, which are on their way when this returns: nothing waits for the device.
        return self.transformer(self.tokenize(texts).to(self.device, non_blocking=True))


class _TextTransformer(nn.Module):
    """transformers' `CLIPTextModel` with its parts under `text_model.`, as released, in any version of the library."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel  # takes seconds; only this class needs it

        valid = CLIPTextConfig().to_dict()
        for key in config:
            if key not in valid:
                raise UserError(f"unknown key {key!r} in text_config{nearest(key, valid)}")
        model = CLIPTextModel(CLIPTextConfig(**config))
        self.text_model = getattr(model, "text_model", model)
        # A buffer built on the meta device would stay there when weights are assigned, so positions are an argument.
        self.text_model.embeddings.position_ids = None
        self.register_load_state_dict_pre_hook(_drop_position_ids)

    @property
    def positions(self) -> int:
        return self.text_model.embeddings.position_embedding.num_embeddings

    @property
    def vocabulary(self) -> int:
        return self.text_model.embeddings.token_embedding.num_embeddings

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) -> (B, L, hidden_size)."""
        position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.text_model(input_ids=ids, position_ids=position_ids).last_hidden_state


def _drop_position_ids(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}text_model.embeddings.position_ids", None)


class FrozenCLIPTextEmbedder(AbstractEncoder):
    """CLIP's pooled text embedding, by the `clip` package, which downloads the weights of `version` on first use.

    Args:
        version: a model name of the `clip` package; not a file, which it would unpickle.
        device: where to put the module; None leaves it on the CPU until it is moved.
        max_length: ids a caption; longer ones are cut.
        n_repeat: how often `encode` repeats the embedding along the context.
        normalize: scale each embedding to length 1.

    Raises:
        UserError: the `clip` package, or torchvision that it needs, is not installed, or `version` is a file.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str | torch.device | None = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        clip = _import_clip()
        if Path(version).is_file():
            raise UserError(f"version {version!r} is a file, which clip would unpickle; give a name of its models")
        self.model, _ = clip.load(version, jit=False, device="cpu")
        self._tokenize = clip.tokenize
        self.max_length = max_length
        self.n_repeat = n_repeat
        self.normalize = normalize
        if device is not None:
            self.to(device)

    def forward(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Captions -> (B, D)."""
        ids = self._tokenize(texts, context_length=self.max_length, truncate=True)
        z = self.model.encode_text(ids.to(next(self.model.parameters()).device))
        return z / z.norm(dim=1, keepdim=True) if self.normalize else z

    def encode(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Captions -> (B, n_repeat, D)."""
        return self(texts)[:, None].expand(-1, self.n_repeat, -1)


def _import_clip() -> ModuleType:
    try:
        import clip
    except ImportError as error:
        raise UserError(
            f"FrozenCLIPTextEmbedder needs the packages clip and torchvision ({error}); install them, "
            "or use ldm.modules.encoders.modules.FrozenCLIPEmbedder, which needs neither"
        ) from error
    return clip
