"""Tests of the encodings of text files."""

from __future__ import annotations

import pytest

from ldm.text_files import decode_text


@pytest.mark.parametrize(
    ("mark", "encoding"), [("", "utf-8"), *(("\ufeff", f"utf-{n}") for n in ("8", "16-le", "16-be"))]
)
def test_decode_text(mark: str, encoding: str) -> None:
    data = f"{mark}é\n".encode(encoding)
    assert decode_text(data) == decode_text(bytearray(data)) == "é\n"


@pytest.mark.parametrize("data", ["é".encode("latin-1"), "é".encode("utf-32"), b"\xff\xfe\x00"])
def test_decode_text_refuses_other_encodings(data: bytes) -> None:
    with pytest.raises(UnicodeDecodeError):
        decode_text(data)
