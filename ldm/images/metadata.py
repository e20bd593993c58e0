"""Metadata files, which list images of a folder with their captions."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from codecs import BOM_UTF32_LE
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

from ldm.files import check_size, open_file, read_at_most
from ldm.images.captions import joined_captions
from ldm.text_files import decode_text, text_encoding
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

# Names of metadata files. The first existing file is read.
METADATA = "metadata.jsonl"
METADATA_FILES = (METADATA, "metadata.csv")
# Synonyms for the keys of an entry. The first existing key is read.
_FILE_KEYS = ("file_name", "file", "filename", "file_path", "filepath", "image", "image_path", "image_file", "path")
_TEXT_KEYS = ("text", "caption", "prompt", "description")
# Keys of an entry with the image before and after an edit, and the instruction: `input_image`, `edited_file_name`, ...
_FILE = "(_(image|img|file|file_name|path|image_path|image_file))?"
_BEFORE, _AFTER = (
    re.compile(f"({names}){_FILE}") for names in ("input|original|source|before", "edited|output|target|after")
)
_INSTRUCTION_KEYS = ("edit_prompt", "edit", "instruction", "edit_instruction", *_TEXT_KEYS)
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN_NAME = re.compile(r"[^/.\\\0][^/\\\0]*(/[^/.\\\0][^/\\\0]*)*")  # a relative path in its shortest form
_MOST_IN_METADATA = 1 << 32  # bytes


def metadata_file(folder: Path) -> Path | None:
    """Return the metadata file of `folder`, or None."""
    return next((folder / name for name in METADATA_FILES if os.path.lexists(folder / name)), None)


class Entry(NamedTuple):
    """Entry of a metadata file. Names are relative to the folder of the file."""

    name: str
    caption: str | None
    edited: str | None = None  # name of the image after the edit in the caption


def from_metadata(
    path: Path,
    pairs: bool = False,
    folder: Path | None = None,
    text_key: str | None = None,
    several: bool = False,
) -> list[Entry]:
    """Return the entries of a metadata file, `.jsonl`, `.csv` or `.json`.

    A `.json` is a mapping of captions by file name, or a list of entries. The keys `file_name` and `text` have the
    synonyms `_FILE_KEYS` and `_TEXT_KEYS`. With `pairs`, the images before and after an edit have the keys `_BEFORE`
    and `_AFTER`. Unknown keys give a warning. Paths may be absolute or have backslashes, but must lie in the folder.

    Args:
        folder: folder of the images; by default that of `path`.
        text_key: required key of the captions.
        several: a caption may be a list of captions, which `joined_captions` joins.

    Raises:
        UserError: an entry has no file name, or names a file outside the folder; gives its line.
    """
    unread: dict[str, None] = {}
    found = list(entries_of(path, pairs, folder, text_key, several, unread))
    warn_of_unread(path, unread)
    return found


def warn_of_unread(path: Path, unread: Iterable[str]) -> None:
    """Log a warning of the keys `unread` in the metadata file at `path`, if there are any."""
    keys = list(unread)
    if keys:
        named = ", ".join(repr(key) for key in keys[:8]) + (" ..." if len(keys) > 8 else "")
        logger.warning("%s: unknown keys ignored: %s", path, named)


def entries_of(
    path: Path, pairs: bool, folder: Path | None, text_key: str | None, several: bool, unread: dict[str, None]
) -> Iterator[Entry]:
    """Yield the entries of `from_metadata`, and add the unknown keys to `unread`. A `.json` is read as a whole."""
    for where, entry in _read(path, pairs):
        keys = keys_of(entry, pairs)
        keys = (keys[0], keys[1] if text_key is None else text_key, keys[2])
        name, caption, edited = (entry.get(key) for key in keys)
        if not isinstance(name, str):
            shown = json.dumps(entry)[:80]
            raise UserError(f"{where}: expected {{'file_name': ..., 'text': ...}}, got {shown!r}")
        if text_key is not None and text_key not in entry:
            raise UserError(f"{where}: has no {text_key!r}, only {', '.join(map(repr, entry)):.80}")
        if edited is not None and not isinstance(edited, str):
            raise UserError(f"{where}: {keys[2]} is not a string: {edited!r:.80}")
        if several and isinstance(caption, list) and all(isinstance(part, str) for part in caption):
            caption = joined_captions(caption)
        elif caption is not None and not isinstance(caption, str):
            hint = "; tools/preencode.py takes a list with --several-captions" if isinstance(caption, list) else ""
            raise UserError(f"{where}: {keys[1]} is not a string: {caption!r:.80}{hint}")
        else:
            caption = joined_captions([caption or ""])
        if any(_SURROGATE.search(text) for text in (name, caption, edited) if text):
            raise UserError(f"{where}: an unpaired surrogate, which is not a character: {json.dumps(entry)[:80]!r}")
        unread |= dict.fromkeys(key for key in entry if key not in keys)
        name, edited = (
            file and relative_name(file, folder or path.parent, f"{where}: {key}")
            for file, key in ((name, keys[0]), (edited, keys[2]))
        )
        yield Entry(name, caption, edited)


def keys_of(entry: Mapping[str, Any], pairs: bool) -> tuple[str | None, str | None, str | None]:
    """Return the keys of file name, caption and, with `pairs`, edited image in `entry`. A missing key is None."""
    file_key = next((key for key in _FILE_KEYS if _is_given(entry.get(key))), None)
    text_key = next((key for key in _TEXT_KEYS if entry.get(key) is not None), None)
    if not pairs:
        return file_key, text_key, None
    before, after = (
        next((key for key in entry if names.fullmatch(key) and _is_given(entry[key])), None)
        for names in (_BEFORE, _AFTER)
    )
    instruction = next((key for key in _INSTRUCTION_KEYS if entry.get(key) is not None), None)
    return before or file_key, instruction, after


def _is_given(value: Any) -> bool:
    """Return False for null and an empty text. Other values that are no file name are errors of the entry."""
    return value is not None and value != ""


def _read(path: Path, pairs: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place and the content of each entry of the metadata file at `path`."""
    refuse_if(path.suffix not in _READERS, f"{path}: captions by file name are read from {', '.join(_READERS)}")
    try:
        try:
            with _opened(path, _READERS[path.suffix].newline) as file:
                yield from _READERS[path.suffix].read(file, path, pairs)
        except UnicodeDecodeError:
            decode_text(read_at_most(path, _MOST_IN_METADATA))  # gives the place in the file
            raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


@contextmanager
def _opened(path: Path, newline: str) -> Iterator[TextIO]:
    """Open a metadata file. `newline` is that of `open`."""
    with open_file(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, _MOST_IN_METADATA)
        encoding = text_encoding(file.read(len(BOM_UTF32_LE)))
        file.seek(0)
        with TextIOWrapper(file, encoding, newline=newline) as text:
            yield text


def _json_entries(file: TextIO, path: Path, pairs: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate((line.removesuffix("\n") for line in file), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected {{'file_name': ..., 'text': ...}}, got {line[:80]!r}")
        yield where, entry


def _mapping_entries(file: TextIO, path: Path, pairs: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    text = file.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if isinstance(content, dict):
        for name, value in content.items():
            entry = value if isinstance(value, dict) else {"text": value}
            yield f"{path}, {name!r:.80}", {"file_name": name, **entry}
        return
    for number, entry in enumerate(content if isinstance(content, list) else [content], 1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}, entry {number}: expected captions by file name, got {json.dumps(entry)[:80]!r}")
        yield f"{path}, entry {number}", entry


def _csv_entries(file: TextIO, path: Path, pairs: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if keys_of(dict.fromkeys(names, "a value"), pairs)[0] is None:
            raise UserError(f"{path}, line 1: expected the columns file_name and text, got {', '.join(names):.80}")
        reader.fieldnames = names
        for entry in reader:
            where = f"{path}, line {reader.line_num}"
            refuse_if(None in entry, f"{where}: has more values than the {len(names)} columns; quote texts with commas")
            yield where, {key: value for key, value in entry.items() if value}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


class _Reader(NamedTuple):
    read: Callable[[TextIO, Path, bool], Iterator[tuple[str, Mapping[str, Any]]]]
    newline: str  # that of `open`: only line feeds end a line of JSON


_READERS = {
    ".jsonl": _Reader(_json_entries, "\n"),
    ".csv": _Reader(_csv_entries, ""),
    ".json": _Reader(_mapping_entries, ""),
}


def relative_name(name: str, folder: Path, where: str) -> str:
    """Return the path `name` relative to `folder`.

    Raises:
        UserError: the path is outside the folder.
    """
    if _PLAIN_NAME.fullmatch(name):
        return name
    path = PurePosixPath(name)
    if "\\" in name and "\0" not in name and not os.path.lexists(folder / path):
        path = PurePosixPath(name.replace("\\", "/"))  # paths from Windows
    if path.is_absolute():
        roots = (folder.absolute(), folder.resolve())
        inside = next((root for root in roots if path.is_relative_to(root)), None)
        path = path.relative_to(inside) if inside is not None else path
    refuse_if(
        "\0" in name or path.is_absolute() or ".." in path.parts or not path.parts,
        f"{where} {name!r:.200} is outside the folder",
    )
    return path.as_posix()
