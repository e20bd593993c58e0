"""Files are there whole, or as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.files import atomic_write


def test_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == path.suffix
            temporary.write_text(text)
        assert path.read_text() == text
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
