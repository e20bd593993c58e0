"""Files behind links, loops of links, and what cannot be read."""

import os

import pytest

from ldm.data.image_sources import find_images
from ldm.images import walk as module
from ldm.images.walk import walk
from ldm.util import UserError
from tests.ldm.images.test_find import RED, put


def names(folder):
    return [path.relative_to(folder).as_posix() for path in walk(folder).files]


def test_walk_follows_links_to_folders(tmp_path):
    put(tmp_path, {"elsewhere/deep/a.png": RED, "here/b.png": RED, "elsewhere/.hidden/c.png": RED})
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "here") == ["b.png", "link/deep/a.png"]


def test_walk_ends_in_a_loop_and_reads_each_folder_once(tmp_path, caplog):
    put(tmp_path, {"z/a.png": RED, "z/a.txt": "a"})
    (tmp_path / "z/up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "z")  # before z in the order of names, and yet z is the name
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert names(tmp_path) == ["z/a.png", "z/a.txt"]
    assert "again: skipped, because this link" in caplog.text and "z/up: skipped, because this link" in caplog.text


def test_walk_names_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    put(tmp_path, {"a.png": RED, "a.txt": "a", "locked/b.png": RED})
    scandir = os.scandir

    def refusing(path):
        if path == tmp_path / "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(module.os, "scandir", refusing)
    items = find_images(tmp_path)
    assert [item.name for item in items] == ["a.png", "locked"]
    with pytest.raises(UserError, match=r"^locked: the folder cannot be read: Permission denied"):
        items[1].read()
    with pytest.raises(UserError, match="locked: the folder cannot be read"):
        find_images(tmp_path / "locked")


def test_walk_names_images_that_are_no_files(tmp_path):
    put(tmp_path, {"a.png": RED, "a.txt": "a"})
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    errors = {item.name: item.error for item in find_images(tmp_path)}
    expected = {"a.png": None, "gone.png": "is a link to a file that is not there", "pipe.png": "is not a plain file"}
    assert errors == expected
