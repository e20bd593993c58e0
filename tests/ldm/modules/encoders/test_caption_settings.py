"""Captions in chunks and clip skip, against the single chunk's encodings; and the settings that tools change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.encoders.caption_length import cut_captions
from ldm.modules.encoders.caption_settings import (
    DEFAULT,
    CaptionSettings,
    caption_settings,
    follow,
    joined_chunks,
    set_caption_settings,
    split_chunks,
)
from ldm.modules.encoders.clip_text import FrozenCLIPEmbedder
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.util import UserError
from tests.golden_data import fill_seeded
from tests.narrow_models import CLIP, OPEN_CLIP

TOWER = {**CLIP, "num_hidden_layers": 3}
OPEN_TOWER = {**OPEN_CLIP, "layers": 2}
# 160 tokens, one per word: chunks of 75, 75 and 10.
FIRST, SECOND, THIRD = "cat " * 75, "dog " * 75, "red " * 10
LONG = FIRST + SECOND + THIRD


def clip(**options: Any) -> FrozenCLIPEmbedder:
    return fill_seeded(FrozenCLIPEmbedder(text_config=TOWER, **options)).eval()


def open_clip(kind: type[FrozenOpenCLIPEmbedder], **options: Any) -> FrozenOpenCLIPEmbedder:
    torch.manual_seed(0)  # of the weights
    return kind(text_config=OPEN_TOWER, layer="penultimate", **options).eval()


def conditioner(**options: Any) -> GeneralConditioner:
    torch.manual_seed(0)
    kinds = {
        FrozenCLIPEmbedder: {"layer": "hidden", "layer_idx": 2, "text_config": TOWER},
        FrozenOpenCLIPEmbedder2: {
            "layer": "penultimate", "always_return_pooled": True, "legacy": False, "text_config": OPEN_TOWER,
        },
    }  # fmt: skip
    return GeneralConditioner(
        [
            {"target": f"ldm.modules.encoders.modules.{kind.__name__}", "params": {**params, **options}}
            | {"input_key": "txt"}
            for kind, params in kinds.items()
        ]
    ).eval()


def test_split_chunks_and_joined_chunks() -> None:
    ids = torch.arange(12).reshape(2, 6)  # two captions of three chunks
    assert split_chunks(ids, 3).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert joined_chunks(split_chunks(ids, 3)[..., None], 3).tolist() == ids[..., None].tolist()


def test_tokenizer_repeats_start_and_end_in_each_chunk() -> None:
    tokenizer = ClipTokenizer(max_length=5, padding=0, chunks=3)
    start, end, (cat,) = tokenizer.start, tokenizer.end, tokenizer.encode(["cat"])[0:1][0]
    expected = [start, cat, cat, cat, end, start, cat, end, 0, 0, start, end, 0, 0, 0]
    assert tokenizer(["cat cat cat cat"]).tolist() == [expected]
    assert tokenizer.room == 9 and tokenizer.cut(["cat " * 9, "cat " * 10]) == {"cat " * 10: 10}


@torch.no_grad()
def by_chunk(stage: nn.Module) -> Tensor:
    """The states of LONG and of a short caption, made from those of single chunks."""
    alone = [stage([text]) for text in (FIRST, SECOND, THIRD, "a cat", "")]
    alone = [part if isinstance(part, Tensor) else part[0] for part in alone]
    return torch.cat([torch.cat(alone[:3], dim=1), torch.cat([alone[3], alone[4], alone[4]], dim=1)])


@pytest.mark.parametrize(
    "build",
    [
        clip,
        lambda **options: clip(clip_skip=2, **options),
        lambda **options: clip(layer="hidden", layer_idx=-2, **options),
        lambda **options: open_clip(FrozenOpenCLIPEmbedder, **options),
        lambda **options: open_clip(FrozenOpenCLIPEmbedder2, legacy=False, always_return_pooled=True, **options),
    ],
    ids=["SD 1", "clip skip", "hidden", "SD 2", "SDXL"],
)
def test_chunks_are_encoded_alone_and_joined(build: Any) -> None:
    one, three = build(), build(max_chunks=3)
    with torch.no_grad():
        found = three([LONG, "a cat"])
    pooled = None if isinstance(found, Tensor) else found[1]
    states = found if pooled is None else found[0]
    assert states.shape[:2] == (2, 231)
    torch.testing.assert_close(states, by_chunk(one), rtol=1e-4, atol=1e-5)
    if pooled is not None:  # that of the first chunk
        torch.testing.assert_close(pooled, one([FIRST, "a cat"])[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_pooled_state_of_clip_is_that_of_the_first_chunk() -> None:
    one, three = clip(always_return_pooled=True), clip(always_return_pooled=True, max_chunks=3)
    torch.testing.assert_close(three([LONG])[1], one([FIRST])[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        clip(layer="pooled", max_chunks=2)([LONG]), one([FIRST])[1][:, None], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_clip_skip_normalises_the_output_of_an_earlier_block() -> None:
    norm = clip().transformer.text_model.final_layer_norm
    for skip in (1, 2, 3):
        raw = clip(layer="hidden", layer_idx=-skip)(["a cat"])
        torch.testing.assert_close(clip(clip_skip=skip)(["a cat"]), norm(raw))
    # A tower without the last block is what clip skip 2 reads.
    shallow = FrozenCLIPEmbedder(text_config={**TOWER, "num_hidden_layers": 2}).eval()
    shallow.load_state_dict(clip().state_dict(), strict=False)
    torch.testing.assert_close(clip(clip_skip=2)(["a cat"]), shallow(["a cat"]))


@torch.no_grad()
def test_both_towers_of_sdxl_read_chunks_and_empty_captions_are_zeros() -> None:
    one, three = conditioner(), conditioner()
    set_caption_settings(three, 225)
    found = three.encode_captions([LONG, ""])
    assert found["crossattn"].shape == (2, 231, 40) and not found["crossattn"][1].any() and not found["vector"][1].any()
    alone = torch.cat([one.encode_captions([text])["crossattn"] for text in (FIRST, SECOND, THIRD)], dim=1)
    torch.testing.assert_close(found["crossattn"][:1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["vector"][:1], one.encode_captions([FIRST])["vector"], rtol=1e-4, atol=1e-5)
    assert caption_settings(three) == CaptionSettings(225, 1) and cut_captions(three, [LONG + SECOND]) == {
        LONG + SECOND: 235
    }


def test_set_caption_settings_changes_a_built_stage() -> None:
    stage = clip()
    assert caption_settings(stage) == DEFAULT and caption_settings(None) == caption_settings(nn.Identity()) == DEFAULT
    set_caption_settings(stage, 150, 2)
    assert caption_settings(stage) == CaptionSettings(150, 2) == caption_settings(clip(max_chunks=2, clip_skip=2))
    with torch.no_grad():
        assert torch.equal(stage([LONG]), clip(max_chunks=2, clip_skip=2)([LONG]))
    set_caption_settings(stage)
    assert caption_settings(stage) == CaptionSettings(150, 2)
    set_caption_settings(stage, 75, 1)
    assert caption_settings(stage) == DEFAULT


def test_caption_settings_as_entries() -> None:
    assert DEFAULT.entries() == {} and CaptionSettings(150, 1).entries() == {"max_tokens": 150}
    assert CaptionSettings.from_entries({"clip_skip": 2, "other": 5}) == CaptionSettings(75, 2)


def test_follow_keeps_what_agrees_with_the_config() -> None:
    stage = clip(clip_skip=2)
    follow(stage, CaptionSettings(150, 2), "the set's")
    assert caption_settings(stage) == CaptionSettings(150, 2)
    with pytest.raises(UserError, match=r"the set's captions have clip_skip 1, but cond_stage_config .* has 2"):
        follow(stage, CaptionSettings(150, 1), "the set's")
    with pytest.raises(
        UserError, match=r"the set's captions have clip_skip 2: is for Stable Diffusion 1, .*; name the release"
    ):
        follow(open_clip(FrozenOpenCLIPEmbedder), CaptionSettings(75, 2), "the set's")


@pytest.mark.parametrize(
    ("stage", "settings", "said"),
    [
        (clip, (100, None), "--max-tokens 100: must be a multiple of 75, such as 150 or 225"),
        (clip, (825, None), "--max-tokens 825: give a whole number from 75 to 750"),
        (clip, (None, 4), "--clip-skip 4: the text encoder has no more layers than 3; leave it out"),
        (clip, (None, 0), "--clip-skip 0: give a whole number"),
        (lambda: clip(max_length=40), (150, None), "--max-tokens 150: the config's FrozenCLIPEmbedder reads no cap"),
        (nn.Identity, (150, None), "--max-tokens 150: the config's Identity reads no captions in chunks"),
        (lambda: clip(layer="hidden", layer_idx=2), (None, 2), "--clip-skip 2: the config chooses the layer hidden"),
        (lambda: open_clip(FrozenOpenCLIPEmbedder), (None, 2), "--clip-skip 2: is for Stable Diffusion 1, not for"),
        (conditioner, (None, 2), "--clip-skip 2: is for Stable Diffusion 1, .*GeneralConditioner"),
    ],
)
def test_settings_that_a_stage_cannot_have(stage: Any, settings: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        set_caption_settings(stage(), *settings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_chunks": 0}, "max_chunks 0: give a whole number from 1 to 10"),
        ({"max_chunks": 2, "max_length": 40}, "max_chunks 2: needs max_length 77, not 40"),
        ({"clip_skip": 4}, "clip_skip 4: give a whole number from 1 to 3"),
        ({"clip_skip": 2, "layer": "pooled"}, "clip_skip 2: needs layer: last, not pooled"),
    ],
)
def test_options_of_a_config_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        clip(**options)


def test_towers_with_different_chunks_are_refused() -> None:
    stage = conditioner()
    stage.embedders[0].tokenizer.chunks = 3
    with pytest.raises(UserError, match=r"max_chunks: the text encoders differ \(1, 3\); give them one"):
        caption_settings(stage)
