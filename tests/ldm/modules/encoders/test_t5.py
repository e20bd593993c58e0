"""T5's encoder: its released keys, and captions by a tokenizer from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ldm.modules.encoders.modules import FrozenT5Embedder
from ldm.util import UserError

SMALL = "google/t5-v1_1-small"
WORDS = {"a": 5, "cat": 6, "dog": 7, "<unk>": 2}


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> str:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def on_meta(**params: object) -> FrozenT5Embedder:
    with torch.device("meta"):
        return FrozenT5Embedder(SMALL, **params)


@pytest.mark.parametrize(("version", "billions"), [(SMALL, 0.035), ("google/t5-v1_1-xl", 1.224)])
def test_frozen_t5_embedder_has_the_released_keys(version: str, billions: float) -> None:
    with torch.device("meta"):
        encoder = FrozenT5Embedder(version)
    keys = set(encoder.state_dict())
    assert {"transformer.shared.weight", "transformer.encoder.final_layer_norm.weight"} <= keys
    assert "transformer.encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in keys
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_tokenize_ends_and_pads_captions(tokenizer_file: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = on_meta(max_length=5, tokenizer_file=tokenizer_file)
    assert encoder.tokenize(["a cat", "a dog a dog a dog"]).tolist() == [[5, 6, 1, 0, 0], [5, 7, 5, 7, 1]]
    assert encoder.tokenize("a bird").tolist() == [[5, 2, 1, 0, 0]]
    assert "Captions of more than 4 tokens are cut" in caplog.text and "(6 tokens)" in caplog.text


def test_captions_become_states(tokenizer_file: str) -> None:
    encoder = FrozenT5Embedder(SMALL, max_length=5, tokenizer_file=tokenizer_file)
    with torch.no_grad():
        states = encoder.encode(["a cat", "a dog"])
        assert states.shape == (2, 5, 512)
        assert torch.equal(states[:1], encoder.encode(["a cat"]))
        ids = torch.tensor([[5, 6, 1, 0, 0]])
        assert torch.allclose(states[:1], encoder.transformer(input_ids=ids).last_hidden_state)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'google/t5-v1_1-xxxl' of FrozenT5Embedder is not known; did you mean"):
        FrozenT5Embedder("google/t5-v1_1-xxxl")
    with pytest.raises(UserError, match=r"needs T5's tokenizer to read captions: set .*tokenizer_file"):
        on_meta().encode(["a cat"])
    with pytest.raises(UserError, match=r"'none\.json': no such file; set .*tokenizer_file"):
        on_meta(tokenizer_file="none.json").encode(["a cat"])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer\.json"):
        on_meta(tokenizer_file=str(tmp_path / "broken.json")).encode(["a cat"])
