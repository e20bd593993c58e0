"""T5's encoder (arXiv:1910.10683, arXiv:2002.05202): captions to hidden states.

B batch, L ids per caption, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.caption_length import LimitedTokenizer
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.util import UserError, nearest

# Of each release: features, features per head, inner features, blocks and heads (table 9 of arXiv:1910.10683, with the
# inner features of version 1.1).
_RELEASED = {
    "google/t5-v1_1-small": (512, 64, 1024, 8, 6),
    "google/t5-v1_1-base": (768, 64, 2048, 12, 12),
    "google/t5-v1_1-large": (1024, 64, 2816, 24, 16),
    "google/t5-v1_1-xl": (2048, 64, 5120, 24, 32),
    "google/t5-v1_1-xxl": (4096, 64, 10240, 24, 64),
}
_VOCABULARY = 32_128  # entries, of which the tokenizer uses the first 32,100
_PADDING, _END = 0, 1


class FrozenT5Embedder(AbstractEncoder):
    """T5's encoder: captions → states of the last layer (B, max_length, D).

    Nothing is downloaded. The weights come with the checkpoint, under `transformer.*`. Captions are split by a
    `tokenizer.json`, which no package contains; only captions need it.

    Args:
        version: the name of a released T5 of version 1.1, such as `google/t5-v1_1-large`.
        device: device of the module; None leaves it on the device where it is built.
        max_length: ids per caption, the end included; longer captions are cut.
        freeze: set evaluation mode and turn gradients off.
        tokenizer_file: path of `tokenizer.json` of that release.

    Raises:
        UserError: the version is unknown.
    """

    def __init__(
        self,
        version: str = "google/t5-v1_1-large",
        device: str | torch.device | None = None,
        max_length: int = 77,
        freeze: bool = True,
        tokenizer_file: str | None = None,
    ) -> None:
        super().__init__()
        if version not in _RELEASED:
            raise UserError(f"version {version!r} of FrozenT5Embedder is not known{nearest(version, list(_RELEASED))}")
        from transformers import T5Config, T5EncoderModel  # takes seconds; only this class needs it

        features, per_head, inner, blocks, heads = _RELEASED[version]
        self.transformer = T5EncoderModel(
            T5Config(
                vocab_size=_VOCABULARY,
                d_model=features,
                d_kv=per_head,
                d_ff=inner,
                num_layers=blocks,
                num_heads=heads,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        self.max_length = max_length
        self.tokenizer_file = tokenizer_file
        self.tokenizer: SentencePieces | None = None
        self.put_on(device)
        if freeze:
            self.freeze()

    def tokenize(self, texts: Sequence[str] | str) -> Tensor:
        """Return the ids (B, max_length) of captions, on the CPU.

        Raises:
            UserError: there is no tokenizer.
        """
        if self.tokenizer is None:
            self.tokenizer = SentencePieces(_read_tokenizer(self.tokenizer_file), self.max_length)
        return self.tokenizer([texts] if isinstance(texts, str) else texts)

    def forward(self, texts: Sequence[str] | str) -> Tensor:
        """Encode captions to (B, max_length, D). Padding is not masked, as in the training of the released models."""
        device = next(self.parameters()).device
        return self.transformer(input_ids=self.tokenize(texts).to(device, non_blocking=True)).last_hidden_state


class SentencePieces(LimitedTokenizer):
    """Tokenizer of captions to ids (B, max_length): text cut to fit, end token, padding."""

    def __init__(self, backend: Any, max_length: int) -> None:
        self._backend, self.max_length, self.room = backend, max_length, max_length - 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._backend.encode(text, add_special_tokens=False).ids for text in texts]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = torch.full((len(texts), self.max_length), _PADDING)
        for row, ids in zip(rows, self.fitting(texts), strict=True):
            row[: len(ids) + 1] = torch.tensor([*ids, _END])
        return rows


def _read_tokenizer(file: str | None) -> Any:
    from tokenizers import Tokenizer

    if file is None or not Path(file).is_file():
        given = "" if file is None else f" {file!r}: no such file;"
        raise UserError(
            f"FrozenT5Embedder needs T5's tokenizer to read captions:{given} set "
            "cond_stage_config.params.tokenizer_file to the tokenizer.json of its release"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the base class itself
        raise UserError(f"tokenizer_file {file}: not a tokenizer.json ({error!s:.200})") from error
