"""Lines and entries of prompts for previews."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.options import add_sampling_options
from ldm.config.preview_prompts import PreviewPrompt, parse_prompt, read_prompt_file
from ldm.util import UserError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a red apple", PreviewPrompt("a red apple")),
        (
            "a cat, 4k --n blurry, low-res --w 512 --h 768 --d 7 --l 3.5 --s 30",
            PreviewPrompt("a cat, 4k", "blurry, low-res", 512, 768, 7, 30, 3.5),
        ),
        ("--n bad --d 0", PreviewPrompt("", "bad", seed=0)),
        ("a well--known place, x-w 3 --w=8", PreviewPrompt("a well--known place, x-w 3", width=8)),
        ({"prompt": "--w 8", "height": 16, "seed": None}, PreviewPrompt("--w 8", height=16)),
    ],
)
def test_parse_prompt(line: Any, expected: PreviewPrompt) -> None:
    assert parse_prompt(line, "here") == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a --ar 16", "here: --ar is not an option of a preview; valid: --n negative_prompt; --w width"),
        ("a --w wide", "here: --w 'wide': give a whole number"),
        ("a --s 0", "here: steps 0: give a whole number of at least 1"),
        ("a --d -1", "here: seed -1: give a whole number from 0"),
        ("a --l nan", "here: scale nan: give a finite number"),
        ("a --w 8 --w 9", "here: --w is given twice"),
        ("a --n b --l 1", "here: the negative prompt needs guidance"),
        ("a ${b}", r"here: prompt 'a \${b}': \${ begins a reference in configs"),
        (5, "here: 5 is no prompt"),
        ({"prompt": 5}, "here: prompt 5: give text, in quotes"),
        ({"seed": 5}, "here: has no prompt"),
        ({"prompt": "a", "sead": 5}, "unknown key 'sead' in here; did you mean 'seed'"),
        ({"prompt": "a", "width": 8.5}, "here: width 8.5: give a whole number"),
    ],
)
def test_parse_prompt_refuses(entry: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_prompt(entry, "here")


def test_the_defaults_of_a_preview_prompt_are_those_of_txt2img() -> None:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    options, prompt = parser.parse_args([]), PreviewPrompt("a")
    assert (prompt.seed, prompt.steps, prompt.scale) == (options.seed, options.steps, options.scale)


def test_read_prompt_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf# comment\r\n\r\n a cat --s 3 \r\nb\xc3\xa4r\n")
    assert read_prompt_file(path) == ["a cat --s 3", "bär"]
    path.write_text("a\n\nb --x 1\n")
    with pytest.raises(UserError, match=r"prompts.txt, line 3: --x"):
        read_prompt_file(path)
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="has no prompt; give one per line"):
        read_prompt_file(path)
