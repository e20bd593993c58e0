"""Textual inversion's cond stage: one row trains, the released keys hold it, and unfit words are named."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch

from ldm.modules.encoders.inversion import TextualInversionEmbedder
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import UserError, instantiate_from_config
from tests.golden_data import fill_seeded, read_json

PREFIX = "cond_stage_model."
TINY = read_json("clip_text")["config"]
TABLE = "transformer.text_model.embeddings.token_embedding.weight"
TOM, CAT = 2435, 2368  # CLIP's ids of "tom" and "cat"
CAPTIONS = ["tom the cat, grinning", "tom and tom", "a cat"]


@pytest.fixture(scope="module")
def plain() -> FrozenCLIPEmbedder:
    return fill_seeded(FrozenCLIPEmbedder(text_config=TINY), PREFIX)


@pytest.fixture
def make(plain: FrozenCLIPEmbedder) -> Callable[..., TextualInversionEmbedder]:
    def build(**options: str) -> TextualInversionEmbedder:
        embedder = TextualInversionEmbedder(**{"token": "tom", "text_config": TINY, **options})
        embedder.load_state_dict(plain.state_dict())
        return embedder

    return build


def loss(embedder: FrozenCLIPEmbedder) -> torch.Tensor:
    return embedder(CAPTIONS).square().sum(-1).sqrt().cumsum(1).mean()


def test_it_reads_as_the_released_tower_does(
    make: Callable[..., TextualInversionEmbedder], plain: FrozenCLIPEmbedder
) -> None:
    with torch.no_grad():
        assert torch.equal(make()(CAPTIONS), plain(CAPTIONS))


def test_one_row_trains(make: Callable[..., TextualInversionEmbedder], plain: FrozenCLIPEmbedder) -> None:
    embedder = make()
    trained = [parameter for parameter in embedder.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trained] == [(TINY["hidden_size"],)]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        loss(embedder).backward()
        optimizer.step()
        optimizer.zero_grad()
    before, after = plain.state_dict(), embedder.state_dict()
    moved = (after[TABLE] != before[TABLE]).any(1).nonzero().flatten()
    assert moved.tolist() == [TOM]
    assert all(torch.equal(after[key], before[key]) for key in before if key != TABLE)


def test_its_gradient_is_the_row_of_the_whole_gradient(
    make: Callable[..., TextualInversionEmbedder], plain: FrozenCLIPEmbedder
) -> None:
    whole, embedder = copy.deepcopy(plain), make()
    loss(whole).backward()
    loss(embedder).backward()
    expected = whole.get_parameter(TABLE).grad
    assert expected[CAT].abs().max() > 0  # which is what the row alone must not take along
    torch.testing.assert_close(embedder.table.row.grad, expected[TOM])
    assert all(p.grad is None for p in embedder.parameters() if p is not embedder.table.row)


def test_freezing_and_thawing(make: Callable[..., TextualInversionEmbedder]) -> None:
    embedder = make()
    embedder.freeze()
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    assert embedder.requires_grad_(True) is embedder
    assert [p for p in embedder.parameters() if p.requires_grad] == [embedder.table.row]


def test_the_state_dict_is_the_releases(
    make: Callable[..., TextualInversionEmbedder], plain: FrozenCLIPEmbedder
) -> None:
    embedder = make()
    with torch.no_grad():
        embedder.table.row.fill_(0.5)
    state = embedder.state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert (state[TABLE][TOM] == 0.5).all()
    other = make()
    other.load_state_dict(state)
    assert torch.equal(other.table.row, embedder.table.row)


def test_built_on_meta_and_assigned(make: Callable[..., TextualInversionEmbedder], plain: FrozenCLIPEmbedder) -> None:
    with torch.device("meta"):
        embedder = TextualInversionEmbedder("tom", text_config=TINY)
    state = plain.state_dict()
    before = state[TABLE].clone()
    embedder.load_state_dict(state, assign=True)
    assert embedder.table.row.requires_grad
    with torch.no_grad():
        assert torch.equal(embedder(CAPTIONS), plain(CAPTIONS))
        embedder.table.row.add_(1)  # in a tensor of its own
    assert torch.equal(state[TABLE], before)


def test_training_begins_at_the_initial_token(make: Callable[..., TextualInversionEmbedder]) -> None:
    embedder = make(initial_token="Cat ")
    table = embedder.state_dict()[TABLE].clone()
    assert torch.equal(embedder.table.row, table[TOM])  # not before it begins
    embedder.begin_training()
    assert torch.equal(embedder.table.row, table[CAT])
    assert embedder.table.row.requires_grad
    alone = make()
    alone.begin_training()
    assert torch.equal(alone.table.row, table[TOM])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"token": "tomcat"}, r"^token 'tomcat' is 2 pieces in CLIP's vocabulary \(tom, cat</w>\); choose a word"),
        ({"token": ""}, r"^token '' is 0 pieces"),
        ({"token": "<|endoftext|>"}, r"^token '<\|endoftext\|>' is in every caption"),
        ({"initial_token": "my mom"}, r"^initial_token 'my mom' is 2 pieces .*\(my</w>, mom</w>\)"),
    ],
)
def test_words_that_are_not_one_piece(words: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextualInversionEmbedder(**{"token": "tom", **words}, text_config=TINY)


def test_options_are_those_of_the_tower() -> None:
    target = "ldm.modules.encoders.inversion.TextualInversionEmbedder"
    with pytest.raises(UserError, match=r"unknown key 'tokn' in params of .*'token'"):
        instantiate_from_config({"target": target, "params": {"tokn": "tom"}})
    with pytest.raises(UserError, match="max_length 100 exceeds"):
        instantiate_from_config({"target": target, "params": {"token": "tom", "max_length": 100, "text_config": TINY}})


def test_captions_without_the_token_are_told_of_once(
    make: Callable[..., TextualInversionEmbedder], caplog: pytest.LogCaptureFixture
) -> None:
    embedder = make()
    with caplog.at_level(logging.WARNING):
        embedder.eval()("a cat")
        embedder.train()(CAPTIONS)
        assert not caplog.records
        embedder(["a cat", ""]).sum().backward()  # a batch that teaches nothing does not stop the training either
        embedder("a cat")
    assert [record.getMessage() for record in caplog.records] == [
        "no caption of a batch has the token 'tom', so the batch does not train it"
    ]
    assert not embedder.table.row.grad.any()
