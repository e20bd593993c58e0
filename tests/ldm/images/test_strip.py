"""The strip of images over time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ldm.images.logged_names import logged_name, spread_evenly
from ldm.images.strip import write_strip

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"  # Pillow starts Ghostscript for it


def test_write_strip_has_a_row_per_prompt_and_a_column_per_step(tmp_path: Path) -> None:
    for key, step, size in (("a", 0, (20, 10)), ("a", 5, (20, 10)), ("b", 5, (600, 300))):
        Image.new("RGB", size, (200, step, 0)).save(tmp_path / logged_name(key, step, 0, 0))
    write_strip(tmp_path, tmp_path / "strip.png")
    write_strip(tmp_path, tmp_path / "strip.png")  # does not contain itself
    strip = Image.open(tmp_path / "strip.png")
    assert strip.size == (2 + 2 * 258, 14 + 12 + 130)
    places = {(0, 0): (2, 14), (0, 1): (260, 14), (1, 0): (2, 26), (1, 1): (260, 26)}
    shown = {place: strip.getpixel(corner) for place, corner in places.items()}
    assert shown == {(0, 0): (200, 0, 0), (0, 1): (200, 5, 0), (1, 0): (0, 0, 0), (1, 1): (200, 5, 0)}


def test_write_strip_writes_nothing_without_images(tmp_path: Path) -> None:
    write_strip(tmp_path, tmp_path / "strip.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"\x89PNG", EPS], ids=["cut", "EPS"])
def test_write_strip_leaves_out_what_is_no_png(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    (tmp_path / logged_name("a", 0, 0, 0)).write_bytes(data)
    write_strip(tmp_path, tmp_path / "strip.png")
    assert not (tmp_path / "strip.png").exists()
    Image.new("RGB", (8, 8), "white").save(tmp_path / logged_name("a", 5, 0, 0))
    write_strip(tmp_path, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (2 + 2 * 10, 14 + 10) and strip.getpixel((2, 14)) == (0, 0, 0)


def test_spread_evenly_keeps_both_ends() -> None:
    assert spread_evenly(range(10), 4) == [0, 3, 6, 9]
    assert (spread_evenly(range(3), 1), spread_evenly(range(3), 0), spread_evenly([], 2)) == ([2], [], [])
