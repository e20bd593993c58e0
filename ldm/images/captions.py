"""Captions of images, from a text file of the same name or a metadata file of the folder."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.files import decode_text, read_at_most
from ldm.util import UserError, refuse_if

logger = logging.getLogger(__name__)

# Names of metadata files. The first existing file is read.
METADATA = "metadata.jsonl"
METADATA_FILES = (METADATA, "metadata.csv")
CAPTION_SUFFIXES = (".txt", ".caption")  # of the file beside an image. The first existing file is read.
# Synonyms for the keys of an entry. The first existing key is read.
_FILE_KEYS = ("file_name", "file", "filename", "file_path", "filepath", "image", "image_path", "image_file", "path")
_TEXT_KEYS = ("text", "caption", "prompt", "description")
# Keys of an entry with the image before and after an edit, and the instruction: `input_image`, `edited_file_name`, ...
_FILE = "(_(image|img|file|file_name|path|image_path|image_file))?"
_BEFORE, _AFTER = (
    re.compile(f"({names}){_FILE}") for names in ("input|original|source|before", "edited|output|target|after")
)
_INSTRUCTION_KEYS = ("edit_prompt", "edit", "instruction", "edit_instruction", *_TEXT_KEYS)
_MOST_IN_CAPTION, _MOST_IN_METADATA = 1 << 20, 1 << 32  # bytes


def decode_caption(data: bytes | bytearray, several: bool = False) -> tuple[str | None, str | None]:
    """Return caption and error of a caption file. White space is collapsed. An empty file has no caption.

    With `several`, each line that is not empty is a caption, and the result has one per line.
    """
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        return None, f"its caption is not UTF-8: {error}"
    return joined_captions(text.splitlines() if several else [text]), None


def joined_captions(captions: Iterable[str]) -> str | None:
    """Return `captions`, one per line and with white space collapsed, without empty ones; None if there are none."""
    return "\n".join(filter(None, (" ".join(caption.split()) for caption in captions))) or None


def same_name(name: str) -> str:
    """Return the normal form of a file name: composed Unicode and a suffix in lower case.

    Programs on macOS write é as e and an accent. Other programs write one character.
    """
    path = PurePosixPath(unicodedata.normalize("NFC", name))
    return str(path.with_suffix(path.suffix.lower())) if path.suffix else str(path)


def spelled(path: Path) -> Path:
    """Return `path` if it exists, else the file whose name and folders have the same normal form, else `path`."""
    if os.path.lexists(path) or path.parent == path:
        return path
    parent = spelled(path.parent)
    try:
        names = _names_in(parent.absolute(), parent.stat().st_mtime_ns)
    except OSError:
        return path
    return parent / names.get(same_name(path.name), path.name)


@lru_cache(maxsize=64)
def _names_in(folder: Path, _modified: int) -> dict[str, str]:
    """Return the names in `folder` by their normal forms."""
    return {same_name(path.name): path.name for path in sorted(folder.iterdir(), reverse=True)}


class CaptionFiles:
    """Search for the caption file of an image, by the normal form of its name. Each folder is listed once.

    The file is `name.txt` or `name.caption` beside `name.jpg`, else `name.jpg.txt`.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, Path]] = {}

    def of(self, image: Path) -> Path | None:
        """Return the caption file beside `image`, or None."""
        names = [*(image.with_suffix(suffix).name for suffix in CAPTION_SUFFIXES), f"{image.name}.txt"]
        for name in names:
            if os.path.lexists(image.parent / name):
                return image.parent / name
        if image.parent not in self._folders:
            try:
                files = [path for path in image.parent.iterdir() if path.suffix.lower() in CAPTION_SUFFIXES]
            except OSError:
                files = []
            self._folders[image.parent] = {same_name(path.name): path for path in sorted(files, reverse=True)}
        spelled = self._folders[image.parent]
        return next((spelled[same_name(name)] for name in names if same_name(name) in spelled), None)


def read_caption(path: Path | None, several: bool = False) -> tuple[str | None, str | None]:
    """Return caption and error of the caption file at `path`; see `decode_caption`. Both are None if `path` is None."""
    if path is None:
        return None, None
    try:
        return decode_caption(read_at_most(path, _MOST_IN_CAPTION), several)
    except OSError as error:
        return None, f"its caption cannot be read: {error.strerror}"
    except UserError as error:
        return None, str(error)


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
    try:
        text = decode_text(read_at_most(path, _MOST_IN_METADATA))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    refuse_if(path.suffix not in _READERS, f"{path}: captions by file name are read from {', '.join(_READERS)}")
    found: list[Entry] = []
    unread: dict[str, None] = {}
    for where, entry in _READERS[path.suffix](text, path, pairs):
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
        if any("\ud800" <= letter <= "\udfff" for letter in name + (caption or "") + (edited or "")):
            raise UserError(f"{where}: an unpaired surrogate, which is not a character: {json.dumps(entry)[:80]!r}")
        unread |= dict.fromkeys(key for key in entry if key not in keys)
        name, edited = (
            file and relative_name(file, folder or path.parent, f"{where}: {key}")
            for file, key in ((name, keys[0]), (edited, keys[2]))
        )
        found.append(Entry(name, caption, edited))
    if unread:
        named = ", ".join(repr(key) for key in list(unread)[:8]) + (" ..." if len(unread) > 8 else "")
        logger.warning("%s: unknown keys ignored: %s", path, named)
    return found


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


def _json_entries(text: str, path: Path, pairs: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not `splitlines`, which also splits at "\u2028"
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


def _mapping_entries(text: str, path: Path, pairs: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
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


def _csv_entries(text: str, path: Path, pairs: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
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


_READERS = {".jsonl": _json_entries, ".csv": _csv_entries, ".json": _mapping_entries}


def relative_name(name: str, folder: Path, where: str) -> str:
    """Return the path `name` relative to `folder`.

    Raises:
        UserError: the path is outside the folder.
    """
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
