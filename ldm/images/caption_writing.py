"""New content of caption files. A caption goes where `ldm.images.find` reads it. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.files import read_at_most
from ldm.images.captions import CaptionFiles, same_name
from ldm.images.find import ImageItem
from ldm.images.metadata import from_metadata, keys_of, metadata_file, relative_name
from ldm.text_files import decode_text
from ldm.util import refuse_if

_MOST_BYTES = 1 << 30


def caption_files(folder: Path, items: Sequence[ImageItem], captions: Mapping[str, str]) -> dict[Path, str]:
    """Return the new content of the files that hold the captions of `items`, the images of `folder`.

    A caption of a metadata file is changed there, and the rest of the file is kept. Any other is written to the text
    file beside its image. White space is collapsed, as in reading.

    Args:
        captions: new captions by the names of the images.

    Returns:
        the content of each file as Latin-1, which stands for its bytes.

    Raises:
        UserError: a name is not of `items`, or a metadata file cannot be read.
    """
    by_name = {item.name: item for item in items}
    files, listed = CaptionFiles(), _Listed(folder)
    in_lists: dict[Path, dict[str, str]] = {}
    found: dict[Path, str] = {}
    for name, caption in captions.items():
        refuse_if(name not in by_name, f"{name}: is not in {folder} any more; open the folder again")
        item, caption = by_name[name], " ".join(caption.split())
        place = listed.place(item.path)
        if place is not None:
            in_lists.setdefault(place[0], {})[place[1]] = caption
        else:
            path = files.of(item.path) or item.path.with_suffix(".txt")
            found[path] = f"{caption}\n".encode().decode("latin-1")
    writers = {".jsonl": _with_json_captions, ".csv": _with_csv_captions}
    for path, changed in in_lists.items():
        text = decode_text(read_at_most(path, _MOST_BYTES))
        found[path] = writers[path.suffix](text, changed, path).encode().decode("latin-1")
    return found


class _Listed:
    """Metadata files of `root` and its folders, and the images whose captions they have."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: dict[Path, dict[str, str]] = {}

    def place(self, image: Path) -> tuple[Path, str] | None:
        """Return the metadata file with the caption of `image`, and the name of the image in it; None for none."""
        for folder in image.parents:
            path = metadata_file(folder)
            if path is not None:
                if path not in self._names:
                    entries = from_metadata(path)
                    self._names[path] = {same_name(entry.name): entry.name for entry in entries if entry.caption}
                name = self._names[path].get(same_name(image.relative_to(folder).as_posix()))
                if name is not None:
                    return path, name
            if folder == self._root:
                break
        return None


def _with_json_captions(text: str, captions: Mapping[str, str], path: Path) -> str:
    lines = text.split("\n")
    for number, line in enumerate(lines):
        entry = json.loads(line) if line.strip() else {}
        name, caption, _ = keys_of(entry, False)
        new = captions.get(relative_name(entry[name], path.parent, str(path))) if name else None
        if new is not None and caption is not None:
            lines[number] = json.dumps({**entry, caption: new}, ensure_ascii=False)
    return "\n".join(lines)


def _with_csv_captions(text: str, captions: Mapping[str, str], path: Path) -> str:
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    names = [name.strip() for name in rows[0]]
    for row in rows[1:]:
        entry = {key: value for key, value in zip(names, row, strict=False) if value}
        name, caption, _ = keys_of(entry, False)
        new = captions.get(relative_name(entry[name], path.parent, str(path))) if name else None
        if new is not None and caption is not None:
            row[names.index(caption)] = new
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\r\n" if "\r\n" in text else "\n").writerows(rows)
    return written.getvalue()
