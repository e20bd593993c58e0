"""The tokenizer against the golden ids and against CLIP's own, which the vocabulary's package also holds."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from ldm.modules.encoders import tokenizer as module
from ldm.modules.encoders.caption_length import cut_captions
from ldm.modules.encoders.tokenizer import ClipTokenizer, clean, vocabulary_path
from ldm.util import UserError
from tests.golden_data import read_json

START, END = 49406, 49407


def _load_clip_tokenizer() -> ModuleType:
    """`clip.simple_tokenizer`, by path: importing the package `clip` would ask for torchvision."""
    spec = importlib.util.spec_from_file_location(
        "simple_tokenizer", vocabulary_path().with_name("simple_tokenizer.py")
    )
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


ORACLE = _load_clip_tokenizer().SimpleTokenizer()
TOKENIZER = ClipTokenizer()

# Assigned characters of the first two planes; beyond, the two regular expression engines know other Unicode versions.
CHARACTERS = st.characters(max_codepoint=0x1F6FF, exclude_categories=("Cs", "Cn", "Co"))
PIECES = st.sampled_from(
    ["'s", "'LL", "don't", "&amp;", "&lt;b&gt;", "&eacute;", "&#128512;", "  ", "\n\t", "“q”", "Ａ", "ﬁ"]
)


def test_golden_ids() -> None:
    golden = read_json("clip_text")
    for prompt, expected in zip(golden["prompts"], golden["token_ids"], strict=True):
        assert TOKENIZER([prompt]).tolist() == [expected], prompt


def test_vocabulary() -> None:
    assert len(TOKENIZER) == 49408
    assert {word: TOKENIZER.encode([word])[0] for word in ("cat", "a", "!")} == {
        word: [ORACLE.encoder[f"{word}</w>"]] for word in ("cat", "a", "!")
    }


def test_pieces() -> None:
    assert TOKENIZER.pieces("A tomcat") == ["a</w>", "tom", "cat</w>"]


@pytest.mark.slow
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.lists(st.text(CHARACTERS, max_size=8) | PIECES, max_size=6).map("".join))
@example("&amp;lt;b&gt; “curly” ’s ﬁne Ｆｕｌｌ")
@example("schÃ¶n, mojibake")
@example("a\x00b\x07c\x1b[31m control\x7f")
@example("\u200b\u00a0\u3000 spaces \u2028 and \u0085 breaks \ufeff")
@example("👩‍👩‍👧 ❤️ 🇫🇷 👍🏽")
@example("½ Ⅷ x² ٣ ฿ ½")
@example("İstanbul ſ ß ǅ")
@example("한국어 ไทย हिन्दी العربية 𝕳𝖊𝖑𝖑𝖔")
@example("lone \ud800 surrogate")
@example("x<|endoftext|>y <|startoftext|>")
@example("w" * 2000)
@example("IT'S we'LL I'd've rock'n'roll ''s")
def test_same_ids_as_clip(text: str) -> None:
    assert TOKENIZER.encode([text]) == [ORACLE.encode(text)]


def test_clean() -> None:
    assert clean("  A &amp;amp; B\n“c”\tÉ ") == 'a & b "c" é'


def test_rows_are_cut_and_padded_to_max_length() -> None:
    short, long = ClipTokenizer(max_length=8)(["a cat", "one two three four five six seven eight"]).tolist()
    assert short == [START, *TOKENIZER.encode(["a cat"])[0], END, END, END, END, END]
    assert long == [START, *TOKENIZER.encode(["one two three four five six"])[0], END]


def test_the_first_caption_that_is_cut_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ClipTokenizer()
    tokenizer(["a cat", "very " * 75])
    assert not caplog.records
    for _ in range(2):
        tokenizer(["a cat", "very " * 76, "quite " * 80])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Captions of more than 75 tokens are cut, the rest is not read; the first of them: 'very ")
    assert line.endswith("(76 tokens)")


def test_cut_captions_leaves_the_telling_to_whoever_asks(caplog: pytest.LogCaptureFixture) -> None:
    stage = SimpleNamespace(tokenizer=ClipTokenizer())
    long = "very " * 76
    assert cut_captions(stage, ["a", long]) == {long: 76}
    stage.tokenizer([long])
    assert not caplog.records


def test_encode_counts_all_ids() -> None:
    assert len(TOKENIZER.encode(["very " * 200])[0]) == 200


def test_no_texts() -> None:
    assert TOKENIZER([]).shape == (0, 77)


def test_missing_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps openai-clip"):
        vocabulary_path()
