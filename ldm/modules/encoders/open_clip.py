"""OpenCLIP's text towers (arXiv:2212.07143), which encode captions for Stable Diffusion 2 and SDXL.

B batch, K chunks per caption, L ids per chunk, D features of the tower, E features of the embedding that captions share
with images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.caption_settings import check_chunks, joined_chunks, split_chunks
from ldm.modules.encoders.clip_blocks import ClipTransformer
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.util import UserError, check_choice, check_keys, check_number, refuse_if

_LAYERS = ("last", "penultimate")
# arch → width, heads, layers and embed_dim of the text tower
_ARCHS = {
    "ViT-B-32": (512, 8, 12, 512),
    "ViT-B-16": (512, 8, 12, 512),
    "ViT-L-14": (768, 12, 12, 768),
    "ViT-L-14-336": (768, 12, 12, 768),
    "ViT-H-14": (1024, 16, 24, 1024),
    "ViT-g-14": (1024, 16, 24, 1024),
    "ViT-bigG-14": (1280, 20, 32, 1280),
}
_QUICK = "-quickgelu"  # suffix of towers with OpenAI's activation, which the version `openai` of each tower also has


def text_config_of(arch: str, version: str | None, changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the sizes of the text tower of `arch`, updated with `changes`.

    Raises:
        UserError: `arch`, or a key of `changes`, is unknown.
    """
    name = arch.removesuffix(_QUICK)
    check_choice("arch", name, tuple(_ARCHS))
    width, heads, layers, embed_dim = _ARCHS[name]
    config = {
        "width": width,
        "heads": heads,
        "layers": layers,
        "embed_dim": embed_dim,
        "vocab_size": 49_408,
        "context_length": 77,
        "quick_gelu": arch.endswith(_QUICK) or version == "openai",
    }
    check_keys("text_config", changes or {}, config)
    config |= changes or {}
    for key, value in config.items():
        if key != "quick_gelu":
            check_number(f"text_config: {key}", value, least=1)
    if config["width"] % config["heads"]:
        raise UserError(f"text_config: width {config['width']} is not a multiple of heads {config['heads']}")
    return config


class OpenClipText(nn.Module):
    """Text half of an OpenCLIP model, under its state-dict keys; see `text_config_of` for its sizes."""

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        embed_dim: int,
        vocab_size: int,
        context_length: int,
        quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = ClipTransformer(width, heads, layers, causal=True, quick_gelu=quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))  # initial value in training; not used here
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        self.register_load_state_dict_pre_hook(_drop_mask)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states (B, L, D) after all blocks and before the last block, both without the final norm."""
        x = self.token_embedding(ids)
        x = x + self.positional_embedding[: ids.shape[1]].to(x.dtype)
        *earlier, block = self.transformer.resblocks
        for one in earlier:
            x = one(x)
        return block(x), x

    def pool(self, last: Tensor, ids: Tensor) -> Tensor:
        """Return the last state at the end token, normalised and projected: (B, E)."""
        at_end = last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]  # the end token has the highest id
        return self.ln_final(at_end) @ self.text_projection.to(last.dtype)


def _drop_mask(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}attn_mask", None)  # the causal mask, which some files contain


class FrozenOpenCLIPEmbedder(AbstractEncoder):
    """OpenCLIP's text tower: captions -> hidden states (B, K · L, D), after the final layer norm.

    The sizes follow from `arch`. The weights come with the checkpoint, and nothing is ever downloaded. State-dict keys
    are the released ones, `model.*`.

    Args:
        arch: name of an OpenCLIP model, such as `ViT-H-14` or `ViT-bigG-14`.
        version: name of the released weights. Only `openai` has an effect: it selects OpenAI's activation.
        device: device of the module; None leaves it where it is built. Ids move to the parameters' device.
        max_length: ids per chunk, start and end included; at most `context_length`.
        freeze: set evaluation mode and turn gradients off.
        layer: `last`, or `penultimate`, the states before the last block.
        text_config: sizes that differ from those of `arch`: `width`, `heads`, `layers`, `embed_dim`, `vocab_size`,
            `context_length`, `quick_gelu`.
        max_chunks: chunks per caption. Each is encoded alone; see `joined_chunks`.

    Raises:
        UserError: `arch`, `layer` or a key of `text_config` is unknown, or `max_length`, `max_chunks` or the vocabulary
            is out of range.
    """

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str | torch.device | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        text_config: Mapping[str, Any] | None = None,
        max_chunks: int = 1,
    ) -> None:
        super().__init__()
        check_choice("layer", layer, _LAYERS)
        config = text_config_of(arch, version, text_config)
        self.layer = layer
        self.max_length = max_length
        check_chunks(max_chunks, max_length)
        self.tokenizer = ClipTokenizer(max_length, padding=0, chunks=max_chunks)
        self.tokenizer.check_tower("context_length", config["context_length"], config["vocab_size"])
        self.model = OpenClipText(**config)
        self.put_on(device)
        if freeze:
            self.freeze()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, texts: Sequence[str] | str) -> Tensor:
        """Return the ids (B, K · L) of captions, on the CPU, padded with 0."""
        return self.tokenizer([texts] if isinstance(texts, str) else texts)

    def forward(self, texts: Sequence[str] | str) -> Tensor:
        """Encode captions to (B, K · L, D)."""
        return joined_chunks(self.model.ln_final(self._states(self._ids(texts))[0]), self.tokenizer.chunks)

    def _ids(self, texts: Sequence[str] | str) -> Tensor:
        """Return the ids (B · K, L) of the chunks, on the device."""
        return split_chunks(self.tokenize(texts).to(self.device, non_blocking=True), self.tokenizer.chunks)

    def _states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of `layer`, and the last ones."""
        last, penultimate = self.model(ids)
        return (last if self.layer == "last" else penultimate), last


class FrozenOpenCLIPEmbedder2(FrozenOpenCLIPEmbedder):
    """OpenCLIP's text tower as in SDXL: without the final norm, and with a pooled vector.

    Args:
        always_return_pooled: return (states (B, K · L, D), pooled (B, E)). The pooled vector is the first chunk's.
        legacy: apply the final norm to the states, as `FrozenOpenCLIPEmbedder` does. There is no pooled vector then.
        options: those of `FrozenOpenCLIPEmbedder`.

    Raises:
        UserError: `always_return_pooled` with `legacy`, or an error of `FrozenOpenCLIPEmbedder`.
    """

    def __init__(self, always_return_pooled: bool = False, legacy: bool = True, **options: Any) -> None:
        refuse_if(always_return_pooled and legacy, "always_return_pooled: true needs legacy: false")
        super().__init__(**options)
        self.return_pooled = always_return_pooled
        self.legacy = legacy

    def forward(self, texts: Sequence[str] | str) -> Tensor | tuple[Tensor, Tensor]:
        """Encode captions to (B, K · L, D), and to (B, E) if `always_return_pooled`."""
        if self.legacy:
            return super().forward(texts)
        ids, chunks = self._ids(texts), self.tokenizer.chunks
        states, last = self._states(ids)
        z = joined_chunks(states, chunks)
        return (z, self.model.pool(last[::chunks], ids[::chunks])) if self.return_pooled else z
