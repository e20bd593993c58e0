"""Text encoder of the first text-to-image latent diffusion: a transformer over BERT's word pieces.

It trains together with the UNet.

B batch, L ids per caption, D features (arXiv:2112.10752, section 4.3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.files import read_at_most
from ldm.modules.encoders.caption_length import LimitedTokenizer
from ldm.modules.encoders.cond_stages import AbstractEncoder
from ldm.util import UserError, refuse_if

_HEADS, _HEAD_FEATURES = 8, 64
_RELEASED = ("google-bert/bert-base-uncased", "bert-base-uncased")  # new and old name of one vocabulary
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_MOST_BYTES = 1 << 26  # of a vocabulary


class TransformerEmbedder(AbstractEncoder):
    """Transformer over ids: (B, L) → (B, L, D). State-dict keys are the released ones, `transformer.*`.

    Args:
        n_embed: features D.
        n_layer: pairs of attention and feed-forward layers.
        vocab_size: number of ids.
        max_seq_len: maximal number of ids per caption.
        device: device of the module; None leaves it on the device where it is built.
        embedding_dropout: share of the embedded tokens' features that training sets to zero.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int,
        max_seq_len: int = 77,
        device: str | torch.device | None = None,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.transformer = _TokenTransformer(n_embed, n_layer, vocab_size, max_seq_len, embedding_dropout)
        self.put_on(device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode ids (B, L) to (B, L, D)."""
        return self.transformer(tokens.to(self.device, non_blocking=True))


class BERTEmbedder(TransformerEmbedder):
    """Encoder of captions, or ids, to the states (B, max_seq_len, D) of a transformer.

    Captions are split into the word pieces of BERT (uncased). The vocabulary is a text file with one piece per line,
    `vocab.txt` of `bert-base-uncased`, which no package contains. It is read from the path `vocab`, or from the Hugging
    Face cache of this machine; nothing is downloaded. Only captions need the vocabulary. The module can be built,
    loaded and saved without it.

    Args:
        n_embed, n_layer, vocab_size, max_seq_len, device, embedding_dropout: see `TransformerEmbedder`.
        use_tokenizer: take captions; if false, take ids.
        vocab: path of the vocabulary.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30_522,
        max_seq_len: int = 77,
        device: str | torch.device | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        vocab: str | None = None,
    ) -> None:
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, device, embedding_dropout)
        self.use_tokenizer = use_tokenizer
        self.vocab = vocab
        self.vocab_size = vocab_size
        self.tokenizer: WordPieces | None = None

    def tokenize(self, texts: Sequence[str] | str) -> Tensor:
        """Return the ids (B, max_seq_len) of captions, on the CPU.

        Raises:
            UserError: there is no vocabulary, or it has more entries than the model.
        """
        if self.tokenizer is None:
            self.tokenizer = WordPieces(vocabulary_path(self.vocab), self.max_seq_len)
            refuse_if(
                len(self.tokenizer) > self.vocab_size,
                f"the vocabulary {self.tokenizer.path} has {len(self.tokenizer)} entries; "
                f"vocab_size of BERTEmbedder is {self.vocab_size}",
            )
        return self.tokenizer([texts] if isinstance(texts, str) else texts)

    def forward(self, text: Sequence[str] | str | Tensor) -> Tensor:
        """Encode captions, or ids (B, L), to (B, L, D)."""
        is_captions = self.use_tokenizer and not isinstance(text, Tensor)
        return super().forward(self.tokenize(text) if is_captions else text)


def vocabulary_path(given: str | None) -> Path:
    """Return the file of BERT's vocabulary: `given`, or the one in the Hugging Face cache.

    Raises:
        UserError: the file does not exist.
    """
    if given is not None:
        refuse_if(
            not Path(given).is_file(),
            f"vocab {given!r} of BERTEmbedder: no such file; give vocab.txt of bert-base-uncased",
        )
        return Path(given)
    from transformers.utils import cached_file  # takes seconds; only captions need it

    for name in _RELEASED:
        try:
            return Path(cached_file(name, "vocab.txt", local_files_only=True))
        except OSError:  # the file is not in the cache
            continue
    raise UserError(
        "BERTEmbedder needs BERT's vocabulary to read captions: set cond_stage_config.params.vocab to the file "
        "vocab.txt of bert-base-uncased"
    )


class WordPieces(LimitedTokenizer):
    """BERT's tokenizer (arXiv:1810.04805, section 3): captions -> ids (B, length), `[CLS]` text `[SEP]` and padding.

    Args:
        path: vocabulary file, one piece per line.
        length: ids per caption; longer captions are cut.

    Raises:
        UserError: the file is not a vocabulary of BERT.
    """

    def __init__(self, path: Path, length: int) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        try:
            pieces = read_at_most(path, _MOST_BYTES).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"vocab {path}: cannot be read as text ({error})") from error
        ids = {piece: number for number, piece in enumerate(pieces)}
        refuse_if(
            not all(piece in ids for piece in _SPECIAL),
            f"vocab {path}: no vocabulary of BERT; it lacks one of {', '.join(_SPECIAL)}",
        )
        self.path = path
        self._backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        self._backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.length, self.room = length, length - 2
        self._padding, self._start, self._end = (ids[piece] for piece in ("[PAD]", "[CLS]", "[SEP]"))

    def __len__(self) -> int:
        """Return the number of entries in the vocabulary."""
        return self._backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # One by one: the library's batches start threads, and then warn when a data loader forks its workers.
        return [self._backend.encode(text).ids for text in texts]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = torch.full((len(texts), self.length), self._padding)
        for row, ids in zip(rows, self.fitting(texts), strict=True):
            row[: len(ids) + 2] = torch.tensor([self._start, *ids, self._end])
        return rows


class _TokenTransformer(nn.Module):
    """Transformer from ids (B, L) to states (B, L, D), under the released keys, which include `to_logits`."""

    def __init__(self, width: int, layers: int, vocabulary: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(positions, width)})
        self.emb_dropout = nn.Dropout(dropout)
        self.attn_layers = nn.ModuleDict({"layers": nn.ModuleList()})
        for _ in range(layers):
            for layer in (_Attention(width), _feed_forward(width)):
                self.attn_layers["layers"].append(nn.ModuleList([nn.LayerNorm(width), layer]))
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocabulary)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        nn.init.normal_(self.pos_emb["emb"].weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.emb_dropout(self.token_emb(ids) + self.pos_emb["emb"](positions))
        for norm, layer in self.attn_layers["layers"]:
            x = x + layer(norm(x))
        return self.norm(x)


class _Attention(nn.Module):
    """Self-attention (B, L, D) → (B, L, D) whose head width is independent of D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = _HEADS * _HEAD_FEATURES
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.to_q(x), self.to_k(x), self.to_v(x))
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=_HEADS) for part in parts)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


def _feed_forward(width: int) -> nn.Module:
    """Return two linear layers with four times the width between them; the released keys are `net.0.0` and `net.2`."""
    first = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
    return _Net(first, nn.Dropout(0.0), nn.Linear(4 * width, width))


class _Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
