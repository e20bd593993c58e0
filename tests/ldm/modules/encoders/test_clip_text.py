"""CLIP's text tower: golden hidden states, released keys, and what it does with bad input."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ldm.modules.encoders.clip_text import FrozenCLIPEmbedder, FrozenCLIPTextEmbedder
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


def of_layer(embedder: FrozenCLIPEmbedder, **options: Any) -> Any:
    """Return the encoding of a caption by a tower with `options` and the fixture's weights."""
    other = FrozenCLIPEmbedder(text_config=TINY, **options).eval()
    other.load_state_dict(embedder.state_dict())
    with torch.no_grad():
        return other(["a cat"])


def test_hidden_layers_lack_the_final_norm(embedder: FrozenCLIPEmbedder) -> None:
    norm, blocks = embedder.transformer.text_model.final_layer_norm, TINY["num_hidden_layers"]
    last = of_layer(embedder)
    torch.testing.assert_close(norm(of_layer(embedder, layer="hidden", layer_idx=blocks)), last)
    torch.testing.assert_close(norm(of_layer(embedder, layer="hidden", layer_idx=-1)), last)
    before = of_layer(embedder, layer="hidden", layer_idx=-2)
    assert torch.equal(before, of_layer(embedder, layer="hidden", layer_idx=blocks - 1))
    shallow = FrozenCLIPEmbedder(text_config=TINY | {"num_hidden_layers": blocks - 1}).eval()
    shallow.load_state_dict(embedder.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(norm(before), shallow(["a cat"]))


def test_the_pooled_state_is_that_of_the_end_token(embedder: FrozenCLIPEmbedder) -> None:
    last = of_layer(embedder)
    at_end = last[:, 3]  # start, a, cat, end
    torch.testing.assert_close(of_layer(embedder, layer="pooled"), at_end[:, None])
    z, pooled = of_layer(embedder, always_return_pooled=True)
    torch.testing.assert_close(z, last)
    torch.testing.assert_close(pooled, at_end)


def test_freeze_is_an_option() -> None:
    assert not any(p.requires_grad for p in FrozenCLIPEmbedder(text_config=TINY, freeze=True).parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"version": "openai/clip-vit-base-patch32"}, "is unknown; use 'openai/clip-vit-large-patch14'"),
        ({"text_config": {"hiden_size": 32}}, "did you mean 'hidden_size'"),
        ({"text_config": {**TINY, "vocab_size": 1000}}, "at least 49408"),
        ({"text_config": TINY, "max_length": 100}, "exceeds max_position_embeddings 77"),
        ({"text_config": TINY, "layer": "penultimate"}, "layer 'penultimate' is unknown; valid: hidden, last, pooled"),
        ({"text_config": TINY, "layer": "hidden"}, "layer_idx None: give a whole number from -"),
        ({"text_config": TINY, "layer": "hidden", "layer_idx": 99}, "layer_idx 99: give a whole number from -"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FrozenCLIPEmbedder(**options)


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
    with pytest.raises(UserError, match="is a file, which the package clip would unpickle"):
        FrozenCLIPTextEmbedder(__file__)


def test_clip_text_embedder_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(UserError, match=r"clip and torchvision .*FrozenCLIPEmbedder"):
        FrozenCLIPTextEmbedder()
