"""Tests of the editing of captions with undo."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ldm.studio.allowed_folders import AllowedFolders
from ldm.studio.caption_editing import CaptionEdits, read_images, replace_text, tag_counts
from ldm.util import UserError

CAPTIONS = {"-dash.png": "tom, grinning", "new\nline.png": "tom, tom", "quote'\".png": "a dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        Image.new("RGB", (4, 4)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    Image.new("RGB", (4, 4)).save(folder / "without.png")
    return folder


def captions(folder: Path) -> dict[str, str | None]:
    return {item.name: item.caption for item in read_images(folder, AllowedFolders([folder]))}


def test_write_and_undo_restore_every_byte(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    edits = CaptionEdits(tmp_path / "undo")
    items = read_images(folder, AllowedFolders([folder]))
    edits.write(folder, items, replace_text(items, "tom", "ann"))
    assert captions(folder) == {"-dash.png": "ann, grinning", "new\nline.png": "ann, ann", "quote'\".png": "a dog",
                                "without.png": None}  # fmt: skip
    edits.write(folder, read_images(folder, AllowedFolders([folder])), {"without.png": "now with"})
    assert captions(folder)["without.png"] == "now with"
    again = CaptionEdits(tmp_path / "undo")  # as after a new start of the studio
    assert again.undo(folder) == 1
    assert again.undo(folder) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(UserError, match="no change of this folder is left"):
        again.undo(folder)


def test_undo_keeps_what_somebody_has_changed_since(folder: Path, tmp_path: Path) -> None:
    edits = CaptionEdits(tmp_path / "undo")
    edits.write(folder, read_images(folder, AllowedFolders([folder])), {"-dash.png": "new"})
    (folder / "-dash.txt").write_text("by hand")
    with pytest.raises(UserError, match="has changed since"):
        edits.undo(folder)
    assert captions(folder)["-dash.png"] == "by hand"


def test_undo_is_of_the_same_folder(folder: Path, tmp_path: Path) -> None:
    edits = CaptionEdits(tmp_path / "undo")
    edits.write(folder, read_images(folder, AllowedFolders([folder])), {"-dash.png": "new"})
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no change of this folder"):
        edits.undo(tmp_path / "other")


@pytest.mark.parametrize(("old", "reason"), [("", "is empty"), ("cat", "no caption contains it")])
def test_replace_text_refuses_what_changes_nothing(folder: Path, old: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        replace_text(read_images(folder, AllowedFolders([folder])), old, "x")


def test_tag_counts_count_images(folder: Path) -> None:
    found = tag_counts(read_images(folder, AllowedFolders([folder])))
    assert found == [["tom", 2], ["a dog", 1], ["grinning", 1]]


def test_read_images_shows_nothing_that_a_link_brings_in(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "without.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "z.png").symlink_to(tmp_path / "secret.png")
    items = {item.name: item for item in read_images(folder, AllowedFolders([folder]))}
    for name in ("without.png", "z.png"):
        assert items[name].caption is None
        with pytest.raises(UserError, match="a link leads out"):
            items[name].read()


def test_read_images_refuses_a_list_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"file_name": "without.png", "text": "a secret"}')
    (folder / "metadata.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UserError, match=r"metadata\.jsonl.*lies outside"):
        captions(folder)
