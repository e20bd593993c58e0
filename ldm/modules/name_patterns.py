"""Patterns of the names of layers and parameters."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Return True if consecutive parts of `name`, which dots separate, match `pattern`.

    `attn2` and `input_blocks.1` both match `input_blocks.1.1.transformer_blocks.0.attn2.to_k`. `?` and `[0-5]` stand
    for one character, and `*` for any text, also across dots: `output_blocks.*.attn2`.
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")
