"""Tests of the options shared by the sampling tools."""

import argparse
from pathlib import Path

import pytest

from ldm.cli.options import add_sampling_options, add_spacing_options, parse_lora, read_prompts


def test_read_prompts_splits_at_line_ends_only(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("one\u2028two\r\n\n three\x85four \n".encode())
    assert read_prompts(["zero"], path) == ["zero", "one\u2028two", "three\x85four"]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_read_prompts_of_files_of_other_systems(tmp_path, end, encoding):
    (tmp_path / "prompts.txt").write_bytes(f"café{end}{end}two".encode(encoding))
    assert read_prompts([], tmp_path / "prompts.txt") == ["café", "two"]


def test_read_prompts_of_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\ntwo".encode())
    assert read_prompts([], path) == ["one", "two"]


def test_parse_lora_takes_the_strength_after_the_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b:2").touch()
    for text, name, strength in [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a:b:-1e-1", "a:b", -0.1),
        ("C:a.safetensors", "C:a.safetensors", 1.0),
        ("b:2", "b:2", 1.0),  # a file of this name
    ]:
        assert parse_lora(text) == (Path(name), strength)
    with pytest.raises(argparse.ArgumentTypeError, match="a:inf: the strength must be a finite number"):
        parse_lora("a:inf")


def test_sampling_options_offer_every_sampler_and_spacing():
    from ldm.models.diffusion.samplers import SAMPLERS
    from ldm.models.diffusion.spacing import SPACINGS

    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    add_spacing_options(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert tuple(choices["sampler"]) == tuple(SAMPLERS) and tuple(choices["spacing"]) == SPACINGS
