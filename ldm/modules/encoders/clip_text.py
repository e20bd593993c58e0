"""CLIP's text tower (arXiv:2103.00020, section 2.4): captions to hidden states, and to one pooled vector.

B batch, K chunks per caption, L ids per chunk, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm.modules.encoders.caption_settings import check_chunks, joined_chunks, split_chunks
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.util import UserError, check_choice, check_keys, check_number, refuse_if

# Text tower of CLIP ViT-L/14 (arXiv:2103.00020, table 20), the caption encoder of Stable Diffusion v1.
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
_LAYERS = ("last", "pooled", "hidden")


def clip_text_config(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the entries of transformers' `CLIPTextConfig` for ViT-L/14, updated with `changes`."""
    return {**_CLIP_L14_TEXT, **(changes or {})}


class FrozenCLIPEmbedder(AbstractEncoder):
    """CLIP's text tower: captions -> hidden states of the last layer, after the final layer norm.

    The weights come with the checkpoint, and nothing is ever downloaded. State-dict keys are the released ones,
    `transformer.text_model.*`. The entry `position_ids` of some releases is ignored.

    Args:
        version: must be the name in the released configs.
        device: device of the module; None leaves it where it is built. Ids move to the parameters' device.
        max_length: ids per chunk, start and end included; at most `max_position_embeddings`.
        text_config: entries of transformers' `CLIPTextConfig` that differ from those of ViT-L/14.
        freeze: set evaluation mode and turn gradients off.
        layer: `last`; `pooled`, the last state at the end token, (B, 1, D); `hidden`, the output of `layer_idx` blocks
            without the final norm.
        layer_idx: number of blocks for `hidden`; -1 means all of them, -2 all except the last.
        always_return_pooled: also return the pooled state (B, D).
        max_chunks: chunks per caption. Each is encoded alone; see `joined_chunks`. The pooled state is the first one's.
        clip_skip: with the layer `last`, apply the final norm to the output of the n-th last block.

    Raises:
        UserError: `version`, `layer` or a key of `text_config` is unknown, or `max_length`, `layer_idx`, `max_chunks`,
            `clip_skip` or the vocabulary is out of range.
    """

    def __init__(
        self,
        version: str = _CLIP_L14,
        device: str | torch.device | None = None,
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
        freeze: bool = False,
        layer: str = "last",
        layer_idx: int | None = None,
        always_return_pooled: bool = False,
        max_chunks: int = 1,
        clip_skip: int = 1,
    ) -> None:
        super().__init__()
        refuse_if(
            version != _CLIP_L14, f"version {version!r} is unknown; use {_CLIP_L14!r}, and text_config for another size"
        )
        config = clip_text_config(text_config)
        self.max_length = max_length
        self.layer = layer
        self.layer_idx = _checked_layer(layer, layer_idx, config["num_hidden_layers"])
        self.blocks = config["num_hidden_layers"]
        self.clip_skip = _checked_clip_skip(clip_skip, layer, self.blocks)
        self.return_pooled = always_return_pooled
        check_chunks(max_chunks, max_length)
        self.tokenizer = ClipTokenizer(max_length, chunks=max_chunks)
        self.transformer = _TextTransformer(config)
        tower = self.transformer
        self.tokenizer.check_tower("max_position_embeddings", tower.positions, tower.vocabulary)
        self.put_on(device)
        if freeze:
            self.freeze()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Return the ids (B, K · L) of captions, on the CPU."""
        return self.tokenizer([texts] if isinstance(texts, str) else texts)

    def forward(self, texts: Sequence[str] | str) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode captions to (B, K · L, hidden_size), or as `layer` and `always_return_pooled` select."""
        # A few kilobytes, copied asynchronously: nothing waits for the device.
        ids = self.tokenize(texts).to(self.device, non_blocking=True)
        chunks = self.tokenizer.chunks
        ids = split_chunks(ids, chunks)  # (B · K, L)
        if self.layer == "last" and self.clip_skip == 1 and not self.return_pooled:
            return joined_chunks(self.transformer(ids), chunks)
        states = self.transformer.states(ids)
        pooled = states.pooled[::chunks]  # of the first chunk: (B, D)
        z = pooled[:, None] if self.layer == "pooled" else joined_chunks(self._chosen(states), chunks)
        return (z, pooled) if self.return_pooled else z

    def _chosen(self, states: _States) -> torch.Tensor:
        """Return the states that `layer`, `layer_idx` and `clip_skip` select."""
        if self.layer == "hidden":
            return states.hidden[self.layer_idx]
        if self.clip_skip == 1:
            return states.last
        return self.transformer.text_model.final_layer_norm(states.hidden[-self.clip_skip])


def _checked_layer(layer: str, layer_idx: int | None, blocks: int) -> int | None:
    check_choice("layer", layer, _LAYERS)
    if layer == "hidden":
        check_number("layer_idx", layer_idx, least=-blocks - 1, most=blocks)
    return layer_idx


def _checked_clip_skip(clip_skip: int, layer: str, blocks: int) -> int:
    check_number("clip_skip", clip_skip, least=1, most=blocks)
    refuse_if(
        clip_skip != 1 and layer != "last",
        f"clip_skip {clip_skip}: needs layer: last, not {layer}; leave one of them out",
    )
    return clip_skip


class _States(NamedTuple):
    """Results of a text tower for ids (B, L)."""

    last: torch.Tensor  # (B, L, D), after the final norm
    pooled: torch.Tensor  # (B, D), the last state at the end token
    hidden: Sequence[torch.Tensor]  # (B, L, D) each: the embeddings, then the output of each block


class _TextTransformer(nn.Module):
    """transformers' `CLIPTextModel` with its parts under the released prefix `text_model.`, in any library version."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel  # takes seconds; only this class needs it

        valid = CLIPTextConfig().to_dict()
        check_keys("text_config", config, valid)
        model = CLIPTextModel(CLIPTextConfig(**config))
        self.text_model = getattr(model, "text_model", model)
        # Positions are an argument, since a buffer on the meta device would stay there when weights are assigned.
        self.text_model.embeddings.position_ids = None
        self.register_load_state_dict_pre_hook(_drop_position_ids)

    @property
    def positions(self) -> int:
        return self.text_model.embeddings.position_embedding.num_embeddings

    @property
    def vocabulary(self) -> int:
        return self.text_model.embeddings.token_embedding.num_embeddings

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Encode ids (B, L) to (B, L, hidden_size)."""
        return self._run(ids).last_hidden_state

    def states(self, ids: torch.Tensor) -> _States:
        """Return the states of every layer for ids (B, L)."""
        out = self._run(ids, output_hidden_states=True)
        # The end token has the highest id. It also pads captions, so take the first one.
        ends = ids.argmax(dim=1)
        pooled = out.last_hidden_state[torch.arange(len(ids), device=ids.device), ends]
        return _States(out.last_hidden_state, pooled, out.hidden_states)

    def _run(self, ids: torch.Tensor, **options: bool) -> Any:
        position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.text_model(input_ids=ids, position_ids=position_ids, **options)


def _drop_position_ids(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}text_model.embeddings.position_ids", None)


class FrozenCLIPTextEmbedder(AbstractEncoder):
    """CLIP's pooled text embedding from the `clip` package, which downloads the weights of `version` on first use.

    Args:
        version: model name of the `clip` package. A file is not accepted, since the package would unpickle it.
        device: device of the module; None leaves it on the CPU until it is moved.
        max_length: ids per caption; longer captions are cut.
        n_repeat: repeats of the embedding along the context in `encode`.
        normalize: scale each embedding to length 1.

    Raises:
        UserError: the package `clip` or torchvision is not installed, or `version` is a file.
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
        refuse_if(
            Path(version).is_file(),
            f"version {version!r} is a file, which the package clip would unpickle; give the name of a model",
        )
        self.model, _ = clip.load(version, jit=False, device="cpu")
        self._tokenize = clip.tokenize
        self.max_length = max_length
        self.n_repeat = n_repeat
        self.normalize = normalize
        if device is not None:
            self.to(device)

    def forward(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Encode captions to (B, D)."""
        ids = self._tokenize(texts, context_length=self.max_length, truncate=True)
        z = self.model.encode_text(ids.to(next(self.model.parameters()).device))
        return z / z.norm(dim=1, keepdim=True) if self.normalize else z

    def encode(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Encode captions to (B, n_repeat, D)."""
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
