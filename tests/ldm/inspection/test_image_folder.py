"""Tests of the problems of a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ldm.images.find import from_folder
from ldm.inspection.image_folder import Problem, find_problems, summarise_problems


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size, colour in (("a.png", (64, 96), "red"), ("b.png", (64, 96), "red"), ("c.png", (96, 64), "red"),
                               ("d.png", (96, 96), "blue")):  # fmt: skip
        Image.new("RGB", size, colour).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a red card")
    (tmp_path / "d.txt").unlink()
    (tmp_path / "c.txt").write_text("word " * 80)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    (tmp_path / "broken.txt").write_text("broken")
    return tmp_path


def test_find_problems_names_each_kind(folder: Path) -> None:
    found = find_problems(from_folder(folder, None), 65)
    assert found == [
        Problem("broken.jpg", "unreadable", "not an image (JPEG, PNG, WEBP, BMP, GIF, TIFF)"),
        Problem("d.png", "no caption", "has no caption"),
        Problem("c.png", "cut", "has a caption of 80 tokens, of which 75 are read"),
        Problem("a.png", "small", "has 64x96 pixels and would be enlarged to 65"),
        Problem("b.png", "small", "has 64x96 pixels and would be enlarged to 65"),
        Problem("c.png", "small", "has 96x64 pixels and would be enlarged to 65"),
        Problem("b.png", "duplicate", "has the same pixels as a.png"),
    ]
    assert summarise_problems(found, 5) == (
        "5 images: 1 cannot be read, 1 without a caption, 1 with a caption that the text encoder cuts, "
        "3 smaller than the size, 1 equal to another image"
    )


def test_find_problems_without_a_size_takes_every_size(folder: Path) -> None:
    assert {problem.kind for problem in find_problems(from_folder(folder, None))} == {
        "unreadable", "no caption", "cut", "duplicate",
    }  # fmt: skip
    assert summarise_problems([], 1) == "1 image: no problems"
