"""CLIP's byte-pair tokenizer (arXiv:2103.00020, section 2.4), built from the vocabulary file that CLIP ships."""

from __future__ import annotations

import functools
import gzip
import html
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import ftfy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from ldm.modules.encoders.caption_length import LimitedTokenizer
from ldm.util import UserError, refuse_if

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
# Merges that CLIP uses, fewer than in the file: 49,408 entries - 2 x 256 byte symbols - 2 special tokens.
_NUM_MERGES = 49_408 - 2 * 256 - 2
# Contractions, runs of letters, single digits, runs of all other characters except spaces.
_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def vocabulary_path() -> Path:
    """Return the vocabulary file of the installed package `clip`. It is not imported, since it would load torchvision.

    Raises:
        UserError: the package is not installed, or lacks the file.
    """
    spec = find_spec("clip")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / _VOCABULARY
        if path.is_file():
            return path
    raise UserError(f"clip/{_VOCABULARY} is not installed; install it with: pip install --no-deps openai-clip")


@functools.cache
def _backend() -> Tokenizer:
    with gzip.open(vocabulary_path(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + _NUM_MERGES]]  # the first line is a version
    # The 256 byte symbols stand first, in the order of their code points.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols), *map("".join, merges), _START, _END]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, merges, end_of_word_suffix=_END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (_START, _END)])
    return tokenizer


def write_vocabulary(folder: Path, pads_with_end: bool) -> None:
    """Write the tokenizer files of transformers: CLIP's with `pads_with_end`, else OpenCLIP's, which pads with `!`."""
    folder.mkdir(parents=True, exist_ok=True)
    _backend().model.save(str(folder))  # vocab.json and merges.txt
    ends = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END if pads_with_end else "!"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    for name, content in (("special_tokens_map.json", ends), ("tokenizer_config.json", {**settings, **ends})):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def clean(text: str) -> str:
    """Clean `text` like CLIP's training captions: repair encoding and HTML entities, collapse spaces, lowercase."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice, since captions were often escaped twice
    return re.sub(r"\s+", " ", text).strip().lower()


class ClipTokenizer(LimitedTokenizer):
    """Tokenizer of captions to ids (B, chunks · max_length): start token, text cut to fit, end token, padding.

    With several `chunks`, the text continues after the end token in the next chunk, which has these tokens too. Chunks
    behind the end of the text are those of the empty caption.

    Args:
        padding: id that fills a chunk up to `max_length`; the end token by default. OpenCLIP uses 0.
        chunks: chunks per caption.

    Raises:
        UserError: the vocabulary file is not installed.
    """

    def __init__(self, max_length: int = 77, padding: int | None = None, chunks: int = 1) -> None:
        self.max_length = max_length
        self.chunks = chunks
        self._backend = _backend()
        self.start, self.end = (self._backend.token_to_id(token) for token in (_START, _END))
        self.padding = self.end if padding is None else padding

    @property
    def room(self) -> int:
        """Tokens per caption besides those of start and end."""
        return self.chunks * (self.max_length - 2)

    def __len__(self) -> int:
        """Return the number of entries in the vocabulary."""
        return self._backend.get_vocab_size()

    def check_tower(self, name: str, positions: int, vocabulary: int) -> None:
        """Raise `UserError` if a text tower has too few `positions` (its setting `name`) or `vocabulary` entries."""
        refuse_if(
            self.max_length > positions, f"max_length {self.max_length} exceeds {name} {positions} of the text tower"
        )
        refuse_if(vocabulary < len(self), f"vocab_size {vocabulary} must be at least {len(self)}, as CLIP's")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return all ids of each text, without start and end tokens."""
        # One text per call: `encode_batch` starts threads, and the library warns if a data loader forks afterwards.
        return [self._backend.encode(clean(text)).ids for text in texts]

    def pieces(self, text: str) -> list[str]:
        """Return the pieces of `text` in the notation of the vocabulary: `</w>` ends a word."""
        return self._backend.encode(clean(text)).tokens

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = torch.full((len(texts), self.chunks, self.max_length), self.padding)
        part = self.max_length - 2
        for caption, fitting in zip(tokens, self.fitting(texts), strict=True):
            for number, row in enumerate(caption):
                ids = [self.start, *fitting[number * part : (number + 1) * part], self.end]
                row[: len(ids)] = torch.tensor(ids)
        return tokens.flatten(1)
