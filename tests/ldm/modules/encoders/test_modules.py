"""The cond stages: golden hidden states, released keys, and what they do with bad input."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ldm.modules.encoders.modules import (
    AbstractEncoder,
    ClassEmbedder,
    DummyEncoder,
    FrozenCLIPEmbedder,
    FrozenCLIPTextEmbedder,
)
from ldm.util import UserError
from tests.golden_data import fill_seeded, read_json, relative_error, released_keys, tensors

PREFIX = "cond_stage_model."
POSITION_IDS = "transformer.text_model.embeddings.position_ids"
TINY = read_json("clip_text")["config"]


@pytest.fixture(scope="module")
def embedder() -> FrozenCLIPEmbedder:
    return fill_seeded(FrozenCLIPEmbedder(text_config=TINY), PREFIX).eval()


def golden_prompts() -> list[str]:
    prompts = read_json("clip_text")["prompts"]
    return [*prompts[:4], prompts[-2]]


def test_golden_hidden_states(embedder: FrozenCLIPEmbedder) -> None:
    with torch.no_grad():
        states = embedder.encode(golden_prompts())
    assert relative_error(states, tensors("clip_text")["clip_text/last_hidden_state"]) < 1e-5


def test_golden_keys(embedder: FrozenCLIPEmbedder) -> None:
    assert {PREFIX + key: list(value.shape) for key, value in embedder.state_dict().items()} == read_json("clip_text")[
        "keys"
    ]


def test_released_keys() -> None:
    with torch.device("meta"):
        state = FrozenCLIPEmbedder().state_dict()
    released = released_keys(PREFIX)
    released.pop(POSITION_IDS, None)
    assert {key: tuple(value.shape) for key, value in state.items()} == released


def test_position_ids_may_come_along_or_not(embedder: FrozenCLIPEmbedder) -> None:
    state = embedder.state_dict()
    assert POSITION_IDS not in state
    embedder.load_state_dict(state)
    embedder.load_state_dict({**state, POSITION_IDS: torch.arange(77)[None]})


def test_built_on_meta_and_assigned(embedder: FrozenCLIPEmbedder) -> None:
    with torch.device("meta"):
        other = FrozenCLIPEmbedder(text_config=TINY)
    other.load_state_dict(embedder.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(other.eval()(["a cat"]), embedder(["a cat"]))


def test_one_caption_is_a_batch_of_one(embedder: FrozenCLIPEmbedder) -> None:
    with torch.no_grad():
        assert torch.equal(embedder("a cat"), embedder(["a cat"]))
    assert embedder.tokenize("a cat").shape == (1, 77)


def test_shorter_context(embedder: FrozenCLIPEmbedder) -> None:
    short = FrozenCLIPEmbedder(text_config=TINY, max_length=20, device="cpu").eval()
    short.load_state_dict(embedder.state_dict())
    with torch.no_grad():
        # Causal attention: what follows a position does not change it.
        torch.testing.assert_close(short(["a cat"]), embedder(["a cat"])[:, :20])


def test_gradients_until_frozen() -> None:
    model = FrozenCLIPEmbedder(text_config=TINY)
    model(["a cat"]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.freeze()
    assert not model.training
    assert not model(["a cat"]).requires_grad


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"version": "openai/clip-vit-base-patch32"}, "is not known; use 'openai/clip-vit-large-patch14'"),
        ({"text_config": {"hiden_size": 32}}, "did you mean 'hidden_size'"),
        ({"text_config": {**TINY, "vocab_size": 1000}}, "at least 49408"),
        ({"text_config": TINY, "max_length": 100}, "exceeds max_position_embeddings 77"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FrozenCLIPEmbedder(**options)


def test_dummy_encoder() -> None:
    t5 = torch.randn(2, 77, 8)
    encoder = DummyEncoder(key="t5")
    assert encoder.encode({"t5": t5}) is t5
    assert encoder(t5) is t5
    with pytest.raises(UserError, match="'t5' of the cond stage is not in the batch, which has f8, txt"):
        encoder({"f8": t5, "txt": t5})


def test_class_embedder() -> None:
    encoder = ClassEmbedder(embed_dim=8, n_classes=10, key="label")
    labels = torch.tensor([3, 7])
    assert torch.equal(encoder({"label": labels}), encoder.embedding.weight[labels][:, None])
    assert torch.equal(encoder.encode({"other": labels}, key="other"), encoder(labels))
    assert list(encoder.state_dict()) == ["embedding.weight"]


def test_freezing_an_encoder() -> None:
    encoder: AbstractEncoder = ClassEmbedder(embed_dim=8)
    encoder.freeze()
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


class StandInClip(nn.Module):
    """Behaves as a model of the `clip` package: ids (B, L) -> embeddings (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([3.0, 0.0, 4.0]))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.sum(dim=1, keepdim=True) * self.scale


def tokenize(texts: str | list[str], context_length: int, truncate: bool) -> torch.Tensor:
    texts = [texts] if isinstance(texts, str) else texts
    return torch.tensor([[len(text)] + [0] * (context_length - 1) for text in texts])


def test_clip_text_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(load=lambda version, jit, device: (StandInClip(), None), tokenize=tokenize)
    monkeypatch.setitem(sys.modules, "clip", package)
    encoder = FrozenCLIPTextEmbedder(n_repeat=2, device="cpu")
    expected = torch.tensor([0.6, 0.0, 0.8])
    torch.testing.assert_close(encoder.encode(["a", "bb"]), expected.expand(2, 2, 3))
    raw = FrozenCLIPTextEmbedder(normalize=False)
    torch.testing.assert_close(raw.encode("bb"), torch.tensor([[[6.0, 0.0, 8.0]]]))
    raw.freeze()
    assert not raw.encode("a").requires_grad
    with pytest.raises(UserError, match="is a file, which clip would unpickle"):
        FrozenCLIPTextEmbedder(__file__)


def test_clip_text_embedder_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(UserError, match=r"clip and torchvision .*FrozenCLIPEmbedder"):
        FrozenCLIPTextEmbedder()
