"""Conditioning of SDXL: several embedders of batch entries, joined by the number of their output dimensions.

B: batch. L: tokens. D: features (arXiv:2307.01952, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.layers import timestep_embedding
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.util import UserError, check_keys, check_number, entry_of, instantiate_from_config, refuse_if

# Number of dimensions of an embedder's output → its key, and the dimension along which outputs are joined.
_OUTPUTS = {2: ("vector", 1), 3: ("crossattn", 2), 4: ("concat", 1), 5: ("concat", 1)}
_EMBEDDER_KEYS = ("target", "params", "input_key", "input_keys", "is_trainable", "ucg_rate", "legacy_ucg_value")


class ConcatTimestepEmbedderND(AbstractEncoder):
    """Sinusoidal embedding of each number separately: (B, N) → (B, N · outdim), cosines first.

    SDXL embeds sizes and crops in this way. A single number per sample may come as (B,).
    """

    def __init__(self, outdim: int) -> None:
        super().__init__()
        check_number("outdim", outdim, least=2)
        self.outdim = outdim

    def forward(self, x: Tensor) -> Tensor:
        numbers = x[:, None] if x.ndim == 1 else x
        embedded = timestep_embedding(numbers.flatten(), self.outdim)  # (B · N, outdim)
        return rearrange(embedded, "(b n) d -> b (n d)", b=len(numbers))


class GeneralConditioner(AbstractEncoder):
    """Embedders joined in their order to a conditioning `{"crossattn": (B, L, D), "vector": (B, D)}`.

    The number of dimensions of an embedder's output selects the key: 2 for `vector`, 3 for `crossattn`, 4 or 5 for
    `concat`. An embedder may return several tensors. State-dict keys are `embedders.<number>.*`.

    Args:
        emb_models: list of embedders. Each has `target` and `params`, and its batch entry `input_key`, or a list
            `input_keys`. `is_trainable` turns its training on. In training, `ucg_rate` is the share of samples whose
            embedding is set to zero, or whose batch entry is set to `legacy_ucg_value` if this is given.

    Raises:
        UserError: an entry of `emb_models` has an unknown key, or lacks one.
    """

    def __init__(self, emb_models: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self._inputs = [_inputs_of(number, config) for number, config in enumerate(emb_models)]
        self._ucg_rates = [float(config.get("ucg_rate") or 0.0) for config in emb_models]
        self._ucg_values = [config.get("legacy_ucg_value") for config in emb_models]
        self.embedders = nn.ModuleList(
            instantiate_from_config({key: config[key] for key in ("target", "params") if key in config})
            for config in emb_models
        )
        self._is_trainable = [bool(config.get("is_trainable", False)) for config in emb_models]
        self.requires_grad_()
        self.train()

    @property
    def input_keys(self) -> list[str]:
        """Batch entries of all embedders, without repetition."""
        return list(dict.fromkeys(key for keys in self._inputs for key in keys))

    @property
    def other_keys(self) -> list[str]:
        """Batch entries of the embedders that read no captions, without repetition."""
        readers = self.caption_embedders
        keys = (key for number, keys in enumerate(self._inputs) if number not in readers for key in keys)
        return list(dict.fromkeys(keys))

    @property
    def caption_embedders(self) -> list[int]:
        """Numbers of the embedders that read captions."""
        return [number for number, embedder in enumerate(self.embedders) if hasattr(embedder, "tokenize")]

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the first embedder that reads captions, or None."""
        return next((self.embedders[number].tokenizer for number in self.caption_embedders), None)

    @property
    def is_trainable(self) -> bool:
        """True if some embedders can be trained."""
        return any(self._is_trainable)

    def requires_grad_(self, requires_grad: bool = True) -> GeneralConditioner:
        """Turn gradients of the trainable embedders on or off; the others stay frozen."""
        for embedder, is_trainable in zip(self.embedders, self._is_trainable, strict=True):
            embedder.requires_grad_(requires_grad and is_trainable)
        return self

    def train(self, mode: bool = True) -> GeneralConditioner:
        """Set training mode; embedders that are not trained stay in evaluation mode."""
        super().train(mode)
        for embedder, is_trainable in zip(self.embedders, self._is_trainable, strict=True):
            embedder.train(mode and is_trainable)
        return self

    def forward(
        self,
        batch: Mapping[str, Any],
        force_zero_embeddings: Sequence[str] = (),
        captions: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the conditioning of a batch, with zeros for embedders of the entries `force_zero_embeddings`.

        `captions` is a result of `encode_captions`, which replaces the embedders of captions.
        """
        parts = [] if captions is None else list(captions.values())
        given = () if captions is None else self.caption_embedders
        for number, embedder in enumerate(self.embedders):
            if number in given:
                continue
            keys = self._inputs[number]
            zeroed = any(key in force_zero_embeddings for key in keys)
            entries = [entry_of(batch, key, f"embedder {number}: input_key") for key in keys]
            for value in self._embed(number, embedder, entries):
                if value.ndim not in _OUTPUTS:
                    raise UserError(f"embedder {number} returns {value.ndim} dimensions; valid: 2 to 5")
                parts.append(torch.zeros_like(value) if zeroed else value)
        return _joined(parts)

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning from captions: `crossattn` (B, L, D), `vector` (B, E).

        An empty caption becomes the replacement of `ucg_rate`: zeros, or the encoding of `legacy_ucg_value`.

        Raises:
            UserError: embedders of captions do not come first, so that their outputs are not the first features.
        """
        readers = self.caption_embedders
        refuse_if(readers != list(range(len(readers))), "emb_models: embedders of captions must come before the others")
        empty = torch.tensor([not caption for caption in captions])
        parts = []
        for number in readers:
            value = self._ucg_values[number]
            texts = [value if value is not None and not caption else caption for caption in captions]
            for part in self._embed(number, self.embedders[number], [texts]):
                rows = empty.to(part.device).view(-1, *(1,) * (part.ndim - 1))
                parts.append(part if value is not None else part.masked_fill(rows, 0.0))
        return _joined(parts)

    @property
    def empties_to_zeros(self) -> bool:
        """True if all embedders of captions encode the empty caption as zeros."""
        return all(self._ucg_values[number] is None for number in self.caption_embedders)

    def _embed(self, number: int, embedder: nn.Module, entries: list[Any]) -> list[Tensor]:
        rate = self._ucg_rates[number] if self.training else 0.0
        if rate and self._ucg_values[number] is not None:
            entries = [_some_replaced(entries[0], self._ucg_values[number], rate), *entries[1:]]
            rate = 0.0
        device = next((parameter.device for parameter in self.parameters()), None)
        entries = [entry.to(device) if device and isinstance(entry, Tensor) else entry for entry in entries]
        with torch.set_grad_enabled(self._is_trainable[number] and torch.is_grad_enabled()):
            given = embedder(*entries)
        values = [given] if isinstance(given, Tensor) else list(given)
        if rate:
            kept = torch.rand(len(values[0]), device=values[0].device) >= rate
            values = [value * kept.to(value.dtype).view(-1, *(1,) * (value.ndim - 1)) for value in values]
        return values

    def get_unconditional_conditioning(
        self,
        batch_c: Mapping[str, Any],
        batch_uc: Mapping[str, Any] | None = None,
        force_uc_zero_embeddings: Sequence[str] | None = None,
        force_cond_zero_embeddings: Sequence[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the conditioning of `batch_c`, and an unconditional one of `batch_uc`, which defaults to `batch_c`.

        Args:
            force_uc_zero_embeddings: batch entries whose embeddings are zero in the unconditional one.
            force_cond_zero_embeddings: batch entries whose embeddings are zero in the conditional one.
        """
        was_training = self.training
        self.eval()  # evaluation mode drops no embedding
        try:
            conditional = self(batch_c, force_cond_zero_embeddings or ())
            unconditional = self(batch_c if batch_uc is None else batch_uc, force_uc_zero_embeddings or ())
        finally:
            self.train(was_training)
        return conditional, unconditional


def _joined(parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Concatenate outputs of embedders along their features. Return them by the key of their number of dimensions."""
    named: dict[str, list[Tensor]] = {}
    for part in parts:
        named.setdefault(_OUTPUTS[part.ndim][0], []).append(part)
    joined = {}
    for name, values in named.items():
        # Stored values are float16, which autocast on the CPU does not mix with bfloat16.
        dtype = reduce(torch.promote_types, (value.dtype for value in values))
        values = [value.to(dtype) for value in values]
        joined[name] = torch.cat(values, dim=_OUTPUTS[values[0].ndim][1]) if len(values) > 1 else values[0]
    return joined


def _some_replaced(entry: Any, value: Any, rate: float) -> Any:
    """Return a batch entry, a tensor or a list, in which `value` replaces a share `rate` of the samples."""
    dropped = torch.rand(len(entry)) < rate
    if isinstance(entry, Tensor):
        entry = entry.clone()
        entry[dropped.to(entry.device)] = value
        return entry
    return [value if drop else one for drop, one in zip(dropped.tolist(), entry, strict=True)]


def _inputs_of(number: int, config: Mapping[str, Any]) -> list[str]:
    check_keys(f"embedder {number} of emb_models", config, _EMBEDDER_KEYS)
    refuse_if(
        ("input_key" in config) == ("input_keys" in config),
        f"emb_models: embedder {number} needs either input_key, its batch entry, or input_keys",
    )
    return [config["input_key"]] if "input_key" in config else list(config["input_keys"])
