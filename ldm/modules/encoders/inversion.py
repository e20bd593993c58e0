"""Textual inversion (arXiv:2208.01618): a new subject learnt as the embedding of one word, with all weights frozen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import UserError

logger = logging.getLogger(__name__)


class TextualInversionEmbedder(FrozenCLIPEmbedder):
    """CLIP's text tower, of which the embedding v of one token is all that trains.

    v* = argmin_v E ‖ε − ε_θ(z_t, t, c_θ(y))‖² over captions y that contain the token (eq. 2). The optimizer gets the
    row v alone, not the table that it stands in: neither weight decay nor momentum can reach another word. State-dict
    keys are those of `FrozenCLIPEmbedder`, with v in its place in the table.

    Args:
        token: the word to learn, one piece of CLIP's vocabulary. A rare one is best: what it meant is lost.
        initial_token: a word, one piece too, from whose embedding a training that begins at step 0 sets out
            (section 4); by default from that of `token`.
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
        """The embeddings of all pieces of the vocabulary."""
        return self.transformer.text_model.embeddings.token_embedding

    def _piece(self, option: str, word: str) -> int:
        """The id of the one piece that is `word`."""
        pieces = self.tokenizer.pieces(word)
        if len(pieces) != 1:
            raise UserError(
                f"{option} {word!r} is {len(pieces)} pieces in CLIP's vocabulary ({', '.join(pieces)}); "
                "choose a word that is one, such as 'sks'"
            )
        [[index]] = self.tokenizer.encode([word])
        if index in (self.tokenizer.start, self.tokenizer.end):
            raise UserError(f"{option} {word!r} is in every caption; choose a rare word, such as 'sks'")
        return index

    def requires_grad_(self, requires_grad: bool = True) -> TextualInversionEmbedder:
        """Let the token's row take gradients, or not; nothing else ever does."""
        super().requires_grad_(False)
        self.table.row.requires_grad_(requires_grad)
        return self

    @torch.no_grad()
    def begin_training(self) -> None:
        """Start from the embedding of `initial_token`; called once, before the first step."""
        if self.initial_index is not None:
            self.table.row.copy_(self.table.weight[self.initial_index])

    def tokenize(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Captions -> ids (B, max_length) on the CPU; in training, says if none of them has the token."""
        ids = super().tokenize(texts)
        if self.training and not self._token_was_missed and not (ids == self.index).any():
            self._token_was_missed = True
            logger.warning("no caption of a batch has the token %r, which learns nothing from it", self.token)
        return ids


class EmbeddingWithTrainedRow(nn.Embedding):
    """An embedding table with one row as a parameter of its own: the rest can stay frozen, and costs no gradient.

    In the state dict there is `weight` alone, with the row in it.
    """

    def __init__(self, table: nn.Embedding, index: int) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.index = index
        self.row = nn.Parameter(table.weight[index].detach().clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) -> (B, L, D)."""
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
