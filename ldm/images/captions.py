"""Captions from `name.txt` beside an image or from `metadata.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from ldm.files import read_at_most
from ldm.util import UserError

METADATA = "metadata.jsonl"
_MOST_IN_CAPTION, _MOST_IN_METADATA = 1 << 20, 1 << 32  # bytes


def decode_caption(data: bytes | bytearray) -> tuple[str | None, str | None]:
    """Caption and error of a caption file: white space is one space; an empty file is no caption."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return None, f"its caption is not UTF-8: {error}"
    return " ".join(text.split()) or None, None


def beside(image: Path) -> tuple[str | None, str | None]:
    """Caption and error from the `.txt` beside `image`; both None where there is none."""
    try:
        return decode_caption(read_at_most(image.with_suffix(".txt"), _MOST_IN_CAPTION))
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"its caption cannot be read: {error.strerror}"
    except UserError as error:
        return None, str(error)


def from_metadata(folder: Path) -> list[tuple[str, str | None]]:
    """File name, relative to `folder`, and caption (`text`) of each line of its `metadata.jsonl`.

    Raises:
        UserError: a line is not a JSON object with `file_name`, or names a file outside `folder`; gives its number.
    """
    path = folder / METADATA
    found: list[tuple[str, str | None]] = []
    try:
        lines = read_at_most(path, _MOST_IN_METADATA).decode("utf-8-sig").split("\n")  # "\u2028" is a letter to JSON
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}, line {number}: expected {{'file_name': ..., 'text': ...}}, got {line[:80]!r}")
        if "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path}, line {number}: file_name {name!r} is outside the folder")
        text = entry.get("text")
        if text is not None and not isinstance(text, str):
            raise UserError(f"{path}, line {number}: text is not a string: {text!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in name + (text or "")):
            raise UserError(f"{path}, line {number}: half of a surrogate pair, which is no letter: {line[:80]!r}")
        found.append((PurePosixPath(name).as_posix(), " ".join((text or "").split()) or None))
    return found
