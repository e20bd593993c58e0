from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ldm.images.find import ImageItem
from ldm.images.repeats import FolderRepeats


def test_folders_with_a_number_repeat_their_images(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = ["10_cat/a.png", "10_cat/more/b.png", "1_dog/c.png", "2024_trip/d.png", "0_x/e.png", "f.png", "5_/g.png"]
    items = [ImageItem(name, Path("data") / name) for name in names]
    alone, packed = ImageItem("a.png", Path("7_cup/a.png")), ImageItem("a.png", Path("7_cup/x.tar"), span=(0, 1))
    repeats = FolderRepeats()
    found = [repeats.of(item) for item in [*items, alone, packed]]
    repeats.log()
    assert [item.repeats for item in found] == [10, 10, 1, 1, 1, 1, 1, 7, 1]
    assert "10_cat: 2 images, each 10 times per epoch of training, as the name says (--no-repeats: once)" in caplog.text
    assert "7_cup: 1 image, each 7 times" in caplog.text and "dog" not in caplog.text
