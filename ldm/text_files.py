"""Text files: their encoding, and their lines. Imports no torch."""

from __future__ import annotations

import codecs
from pathlib import Path

from ldm.files import read_at_most
from ldm.util import UserError

_MOST_TEXT = 1 << 28  # maximum size of a text file in bytes


def decode_text(data: bytes | bytearray) -> str:
    """Return the text of a file: UTF-8, or UTF-16 with a byte order mark, as shells of Windows write it.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    return bytes(data).decode(text_encoding(data))


def text_encoding(start: bytes | bytearray) -> str:
    """Return the encoding of a text file with the first bytes `start`; see `decode_text`."""
    utf16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
    return "utf-16" if start.startswith(utf16) and not start.startswith(codecs.BOM_UTF32_LE) else "utf-8-sig"


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not empty, without outer spaces, each with its number from 1 on.

    Raises:
        UserError: the file is too large, or is not UTF-8 text.
    """
    try:
        text = decode_text(read_at_most(path, _MOST_TEXT))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
