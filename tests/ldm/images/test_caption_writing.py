"""Tests of the new content of caption files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.images.caption_writing import caption_files
from ldm.images.find import from_folder
from ldm.util import UserError


def write(folder: Path, captions: dict[str, str]) -> list[str]:
    """Write `captions`, and return the names of the written files."""
    found = caption_files(folder, from_folder(folder, None), captions)
    for path, text in found.items():
        path.write_bytes(text.encode("latin-1"))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def captions_in(folder: Path) -> dict[str, str | None]:
    return {item.name: item.caption for item in from_folder(folder, None)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg", "in/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def test_caption_files_are_those_that_are_read(folder: Path) -> None:
    (folder / "a.caption").write_text("old")
    assert write(folder, {"a.png": " a  cat,\nöäü ", "in/c.png": "c"}) == ["a.caption", "in/c.txt"]
    assert captions_in(folder) == {"a.png": "a cat, öäü", "b.jpg": None, "in/c.png": "c"}


def test_caption_files_keep_the_rest_of_a_list(folder: Path) -> None:
    lines = [
        {"file_name": "a.png", "text": "old a", "extra": [1, 2]},
        {"image": "./in/c.png", "caption": "old c"},
        {"file_name": "b.jpg"},
    ]
    text = "\n\n".join(map(json.dumps, lines)) + "\n"
    (folder / "metadata.jsonl").write_text(text)
    assert write(folder, {"a.png": 'new "a" é', "in/c.png": "new c", "b.jpg": "b"}) == ["b.txt", "metadata.jsonl"]
    kept = (folder / "metadata.jsonl").read_text(encoding="utf-8").split("\n")
    assert json.loads(kept[0]) == {"file_name": "a.png", "text": 'new "a" é', "extra": [1, 2]}
    assert kept[4] == json.dumps(lines[2])
    assert captions_in(folder) == {"a.png": 'new "a" é', "in/c.png": "new c", "b.jpg": "b"}


def test_caption_files_keep_the_columns_of_a_table(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes(b'file_name, text,n\r\na.png,"old, a",1\r\nb.jpg,old b,2\r\n')
    assert write(folder, {"a.png": 'new, "a"'}) == ["metadata.csv"]
    assert (folder / "metadata.csv").read_bytes() == b'file_name, text,n\r\na.png,"new, ""a""",1\r\nb.jpg,old b,2\r\n'


def test_caption_files_of_inner_lists(folder: Path) -> None:
    (folder / "in/metadata.jsonl").write_text('{"file_name": "c.png", "text": "old"}')
    assert write(folder, {"in/c.png": "new", "a.png": "a"}) == ["a.txt", "in/metadata.jsonl"]
    assert captions_in(folder)["in/c.png"] == "new"


def test_caption_files_refuse_an_image_that_is_gone(folder: Path) -> None:
    with pytest.raises(UserError, match=r"x\.png: is not in .* any more"):
        caption_files(folder, from_folder(folder, None), {"x.png": "x"})
