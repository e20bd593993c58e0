"""Tests of folders that are written as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm import folders
from ldm.files import remove_leftovers, temporary_path
from ldm.folders import atomic_folder, check_replaceable
from ldm.util import UserError


def fill(folder: Path, text: str) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("start", ["missing", "empty", "full"])
def test_atomic_folder_replaces_the_whole(
    start: str, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    path = tmp_path / "model"
    if start != "missing":
        path.mkdir()
    if start == "full":
        fill(path, "old")
        (path / "left").touch()
    with atomic_folder(path) as temporary:
        fill(temporary, "new")
        assert start == "missing" or names(path) == (["left", "part"] if start == "full" else [])
    assert (path / "part/file").read_text() == "new" and names(path) == ["part"] and names(tmp_path) == ["model"]


@pytest.mark.parametrize("start", ["missing", "full"])
def test_atomic_folder_leaves_nothing_of_a_failure(start: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if start == "full":
        path.mkdir()
        fill(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        fill(temporary, "new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ([] if start == "missing" else ["model"])
    assert start == "missing" or (path / "part/file").read_text() == "old"


def test_remove_leftovers_removes_folders_of_ended_processes(tmp_path: Path) -> None:
    left = temporary_path(tmp_path / "model")
    left = left.with_name(left.name.replace(f".{os.getpid()}-", ".999999999-"))
    left.mkdir()
    fill(left, "half")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_check_replaceable(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new", "index")
    check_replaceable(tmp_path, "index")
    (tmp_path / "diary.txt").touch()
    with pytest.raises(UserError, match="has other files"):
        check_replaceable(tmp_path, "index")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link, and a folder is replaced as a whole; name the folder itself"):
        check_replaceable(tmp_path / "link", "index")
    with pytest.raises(UserError, match="is not a folder"):
        check_replaceable(tmp_path / "diary.txt", "index")
    (tmp_path / "index").touch()
    check_replaceable(tmp_path, "index")
