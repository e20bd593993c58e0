"""Captions that are longer than a text encoder reads."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_NAMED = 5  # prompts in a warning


class LimitedTokenizer(ABC):
    """Tokenizer that takes a limited number of ids per caption, `room`, besides those of start and end.

    It warns of the first caption that it cuts, unless `cut_captions` has been asked.
    """

    room: int
    says_cuts = True

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return all ids of each text, without start and end tokens."""

    def cut(self, texts: Sequence[str]) -> dict[str, int]:
        """Return the truncated texts and their numbers of tokens, without start and end."""
        lengths = {text: len(ids) for text, ids in zip(texts, self.encode(texts), strict=True)}
        return {text: length for text, length in lengths.items() if length > self.room}

    def fitting(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text that there is room for."""
        encoded = self.encode(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if self.says_cuts and len(ids) > self.room:
                self.says_cuts = False
                logger.warning("Captions of more than %d tokens are cut, the rest is not read; the first of them: %r "
                               "(%d tokens)", self.room, text[:80], len(ids))  # fmt: skip
        return [ids[: self.room] for ids in encoded]


def cut_captions(cond_stage: Any, texts: Sequence[str]) -> dict[str, int]:
    """Return the texts that `cond_stage` truncates and their numbers of tokens. Empty without a tokenizer."""
    tokenizer = getattr(cond_stage, "tokenizer", None)
    if not isinstance(tokenizer, LimitedTokenizer):
        return {}
    for part in cond_stage.modules() if isinstance(cond_stage, nn.Module) else [cond_stage]:
        if isinstance(getattr(part, "tokenizer", None), LimitedTokenizer):
            part.tokenizer.says_cuts = False  # whoever asks tells of them
    return tokenizer.cut(texts)


def warn_of_cut(cond_stage: Any, texts: Sequence[str]) -> None:
    """Log a warning with the texts that `cond_stage` truncates."""
    cut = cut_captions(cond_stage, list(dict.fromkeys(texts)))
    if not cut:
        return
    shown = "; ".join(f"{text!r:.80} ({length} tokens)" for text, length in list(cut.items())[:_NAMED])
    more = f"; and {len(cut) - _NAMED} more" if len(cut) > _NAMED else ""
    logger.warning(
        "%d prompts are longer than %d tokens and are cut: %s%s", len(cut), cond_stage.tokenizer.room, shown, more
    )
