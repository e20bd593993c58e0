"""The text encoder of the first text-to-image latent diffusion, against another implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.modules.encoders.bert import BERTEmbedder, TransformerEmbedder, WordPieces, vocabulary_path
from ldm.modules.encoders.caption_length import cut_captions
from ldm.util import UserError
from tests.golden_data import fill_seeded

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "##fish", ",", "cafe"]


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return str(path)


def test_released_bert_keys() -> None:
    with torch.device("meta"):
        state = BERTEmbedder(n_embed=1280, n_layer=32).state_dict()
    block = {
        f"transformer.attn_layers.layers.{key}": shape
        for key, shape in {
            "0.0.weight": (1280,),
            "0.0.bias": (1280,),
            "0.1.to_q.weight": (512, 1280),
            "0.1.to_k.weight": (512, 1280),
            "0.1.to_v.weight": (512, 1280),
            "0.1.to_out.weight": (1280, 512),
            "0.1.to_out.bias": (1280,),
            "1.0.weight": (1280,),
            "1.0.bias": (1280,),
            "1.1.net.0.0.weight": (5120, 1280),
            "1.1.net.0.0.bias": (5120,),
            "1.1.net.2.weight": (1280, 5120),
            "1.1.net.2.bias": (1280,),
        }.items()
    }
    ends = {
        "transformer.token_emb.weight": (30_522, 1280),
        "transformer.pos_emb.emb.weight": (77, 1280),
        "transformer.norm.weight": (1280,),
        "transformer.norm.bias": (1280,),
        "transformer.to_logits.weight": (30_522, 1280),
        "transformer.to_logits.bias": (30_522,),
    }
    assert len(state) == len(ends) + 32 * len(block)
    for key, shape in (ends | block).items():
        assert tuple(state[key].shape) == shape, key


@pytest.mark.slow
def test_transformer_embedder_is_the_one_of_diffusers() -> None:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    ours = fill_seeded(TransformerEmbedder(n_embed=64, n_layer=2, vocab_size=50, max_seq_len=9)).eval()
    theirs = LDMBertModel(
        LDMBertConfig(vocab_size=50, max_position_embeddings=9, encoder_layers=2, encoder_ffn_dim=256, d_model=64)
    ).eval()
    names = {"token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm"}
    for number in range(2):
        attention, feed = (f"attn_layers.layers.{2 * number + i}" for i in (0, 1))
        names |= {
            f"{attention}.0": f"layers.{number}.self_attn_layer_norm",
            **{f"{attention}.1.to_{part}": f"layers.{number}.self_attn.{part}_proj" for part in "qkv"},
            f"{attention}.1.to_out": f"layers.{number}.self_attn.out_proj",
            f"{feed}.0": f"layers.{number}.final_layer_norm",
            f"{feed}.1.net.0.0": f"layers.{number}.fc1",
            f"{feed}.1.net.2": f"layers.{number}.fc2",
        }
    for mine, other in names.items():
        theirs.model.get_submodule(other).load_state_dict(ours.transformer.get_submodule(mine).state_dict())
    ids = torch.tensor([[1, 4, 9, 16, 25, 36, 49, 0, 3], [2, 3, 5, 7, 11, 13, 17, 19, 23]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(ids[:, :4]), theirs(ids[:, :4]).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_word_pieces(vocab: str, caplog: pytest.LogCaptureFixture) -> None:
    ids = WordPieces(Path(vocab), 8)(["A Café, catfish", "", "dog " + "cats " * 9])
    assert "Captions of more than 6 tokens are cut" in caplog.text and "(19 tokens)" in caplog.text
    assert ids.tolist() == [[2, 4, 9, 8, 5, 7, 3, 0], [2, 3, 0, 0, 0, 0, 0, 0], [2, 1, 5, 6, 5, 6, 5, 3]]


def test_bert_embedder_takes_captions_or_ids(vocab: str) -> None:
    model = BERTEmbedder(n_embed=8, n_layer=1, vocab_size=10, max_seq_len=6, vocab=vocab).eval()
    captions = model.encode(["a cat", "cats"])
    assert captions.shape == (2, 6, 8)
    assert torch.equal(captions, model(model.tokenize(["a cat", "cats"])))
    assert torch.equal(model("a cat"), captions[:1])
    assert cut_captions(model, ["a cat", "cats cats cats"]) == {"cats cats cats": 6}
    ids = BERTEmbedder(n_embed=8, n_layer=1, vocab_size=10, max_seq_len=6, use_tokenizer=False).eval()
    ids.load_state_dict(model.state_dict())
    assert torch.equal(ids(torch.tensor([[2, 4, 5, 3, 0, 0]])), captions[:1])


def test_the_embedding_is_dropped_out_in_training() -> None:
    model = TransformerEmbedder(n_embed=8, n_layer=1, vocab_size=10, embedding_dropout=0.5)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_the_vocabulary_is_found_in_the_cache(vocab: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def cached_file(name: str, file: str, local_files_only: bool) -> str:
        asked.append(name)
        if not local_files_only or (name, file) != ("bert-base-uncased", "vocab.txt"):
            raise OSError("not in the cache")
        return vocab

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert vocabulary_path(None) == Path(vocab)
    assert asked == ["google-bert/bert-base-uncased", "bert-base-uncased"]


def test_without_a_vocabulary_only_captions_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # empty
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = BERTEmbedder(n_embed=8, n_layer=1, vocab_size=10)
    with pytest.raises(UserError, match=r"set cond_stage_config.params.vocab to the file vocab.txt of bert-base"):
        model(["a cat"])
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 8)


def test_a_wrong_vocabulary_is_named(vocab: str, tmp_path: Path) -> None:
    for content, said in (("a\ncat\n", "no vocabulary of BERT; it lacks"), (None, "no such file")):
        path = tmp_path / f"{bool(content)}.txt"
        if content:
            path.write_text(content)
        with pytest.raises(UserError, match=said):
            BERTEmbedder(n_embed=8, n_layer=1, vocab=str(path))(["a cat"])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        WordPieces(tmp_path / "bytes.txt", 7)
    with pytest.raises(UserError, match="has 10 entries; vocab_size of BERTEmbedder is 9"):
        BERTEmbedder(n_embed=8, n_layer=1, vocab_size=9, vocab=vocab)(["a cat"])
