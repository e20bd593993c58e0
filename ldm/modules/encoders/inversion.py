"""Textual inversion (arXiv:2208.01618): training of the embedding of one word. All weights are frozen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import refuse_if

logger = logging.getLogger(__name__)


class TextualInversionEmbedder(FrozenCLIPEmbedder):
    """CLIP's text tower in which only the embedding v of one token trains.

    v* = argmin_v E ‖ε − ε_θ(z_t, t, c_θ(y))‖² over captions y that contain the token (eq. 2). The optimizer gets only
    the row v, not the whole table, so that weight decay and momentum cannot change another word. State-dict keys are
    those of `FrozenCLIPEmbedder`, with v at its place in the table.

    Args:
        token: word to learn, one piece of CLIP's vocabulary. Choose a rare one, since its old meaning is lost.
        initial_token: word, also one piece, whose embedding initialises a training that begins at step 0 (section 4);
            the default is `token`.
        options: those of `FrozenCLIPEmbedder`.

    Raises:
        UserError: one of the words is not exactly one piece.
    """

    def __init__(self, token: str, initial_token: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.token = token
        self.index = self._piece("token", token)
        self.initial_index = None if initial_token is None else self._piece("initial_token", initial_token)
        embeddings = self.transformer.text_model.embeddings
        embeddings.token_embedding = EmbeddingWithTrainedRow(embeddings.token_embedding, self.index)
        self._token_was_missed = False
        self.requires_grad_()

    @property
    def table(self) -> EmbeddingWithTrainedRow:
        """Embeddings of all pieces of the vocabulary."""
        return self.transformer.text_model.embeddings.token_embedding

    def _piece(self, option: str, word: str) -> int:
        """Return the id of the piece that equals `word`."""
        pieces = self.tokenizer.pieces(word)
        ids = self.tokenizer.encode([word])[0]
        refuse_if(
            len(pieces) != 1,
            f"{option} {word!r} is {len(pieces)} pieces in CLIP's vocabulary ({', '.join(pieces)}); "
            "choose a word that is one piece, such as 'sks'",
        )
        refuse_if(
            {self.tokenizer.start, self.tokenizer.end} & set(ids),
            f"{option} {word!r} is in every caption; choose a rare word, such as 'sks'",
        )
        return ids[0]

    def requires_grad_(self, requires_grad: bool = True) -> TextualInversionEmbedder:
        """Turn gradients of the token's row on or off; all other parameters stay frozen."""
        super().requires_grad_(False)
        self.table.row.requires_grad_(requires_grad)
        return self

    @torch.no_grad()
    def begin_training(self) -> None:
        """Start from the embedding of `initial_token`. The trainer calls this once, before the first step."""
        if self.initial_index is not None:
            self.table.row.copy_(self.table.weight[self.initial_index])

    def tokenize(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Return the ids (B, max_length) of captions, on the CPU. In training, warn if none has the token."""
        ids = super().tokenize(texts)
        if self.training and not self._token_was_missed and not (ids == self.index).any():
            self._token_was_missed = True
            logger.warning("no caption of a batch has the token %r, so the batch does not train it", self.token)
        return ids


class EmbeddingWithTrainedRow(nn.Embedding):
    """Embedding table with one row as a separate parameter. The other rows can stay frozen without a gradient.

    The state dict contains only `weight`, with the row in it.
    """

    def __init__(self, table: nn.Embedding, index: int) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.index = index
        self.row = nn.Parameter(table.weight[index].detach().clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed ids (B, L) to (B, L, D)."""
        return torch.where((ids == self.index)[..., None], self.row, super().forward(ids))

    @torch.no_grad()
    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        self.weight[self.index] = self.row
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}row"]

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        table = state_dict.get(f"{prefix}weight")
        if table is not None:
            state_dict[f"{prefix}row"] = table[self.index].clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
