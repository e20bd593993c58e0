"""Tests of patterns of names."""

from __future__ import annotations

import pytest

from ldm.modules.name_patterns import matches


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("attn2", "a.1.attn2.to_k.weight", True),
        ("attn", "a.1.attn2.to_k.weight", False),  # whole parts
        ("attn?", "a.1.attn2.to_k.weight", True),
        ("blocks.1", "unet.blocks.1.weight", True),
        ("blocks.1", "unet.blocks.11.weight", False),
        ("blocks.[2-4]", "unet.blocks.3.weight", True),
        ("unet.weight", "unet.blocks.1.weight", False),  # consecutive parts
        ("unet.*.1", "unet.blocks.1.weight", True),
        ("a.b.c", "a.b", False),
        ("output_blocks.*.attn2", "unet.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight", True),
        ("output_blocks.*.attn", "unet.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight", False),
    ],
)
def test_matches(pattern: str, name: str, is_match: bool) -> None:
    assert matches(pattern, name) is is_match
