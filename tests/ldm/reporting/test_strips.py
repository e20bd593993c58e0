from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from ldm.reporting.strips import read_strips, show
from tests.run_folders import write_image


def test_read_strips_orders_steps_and_shows_their_images(tmp_path: Path) -> None:
    for step in (4, 1000000, 2):
        for key in ("inputs", "samples"):
            write_image(tmp_path / f"images/train/{key}_gs-{step:06}_e-000000_b-000000.png", 2)
    write_image(tmp_path / "images/train/other.png", 1)
    [strip] = read_strips(tmp_path, 1 << 20, [])
    assert [frame.step for frame in strip.frames] == [2, 4, 1000000]
    assert [image.name for image in strip.frames[0].images] == ["samples", "inputs"]
    image = Image.open(io.BytesIO(base64.b64decode(strip.frames[0].images[0].uri.partition(",")[2])))
    assert image.size == (16, 16) and abs(image.getpixel((8, 8))[0] - 100) < 12


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"  # Pillow starts Ghostscript for it


@pytest.mark.parametrize("data", [b"\x89PNG", EPS], ids=["cut", "EPS"])
def test_read_strips_lists_a_damaged_image(tmp_path: Path, monkeypatch, data: bytes) -> None:
    def refuse(*words: object, **_: object) -> None:
        pytest.fail(f"starts {words}")

    monkeypatch.setattr("subprocess.Popen", refuse)
    write_image(tmp_path / "images/train/samples_gs-000001_e-000000_b-000000.png", 1)
    (tmp_path / "images/train/samples_gs-000002_e-000000_b-000000.png").write_bytes(data)
    problems: list[str] = []
    [strip] = read_strips(tmp_path, 1 << 20, problems)
    assert [frame.step for frame in strip.frames] == [1]
    assert len(problems) == 1 and "gs-000002" in problems[0] and "not a readable image" in problems[0]


def test_read_strips_keeps_within_the_budget_with_the_last_step(tmp_path: Path) -> None:
    for step in range(8):
        write_image(tmp_path / f"images/train/samples_gs-{step:06}_e-000000_b-000000.png", step % 4)
    size = len(show(Image.new("RGB", (16, 16)), "x").uri)
    [strip] = read_strips(tmp_path, 5 * size, [])
    assert strip.frames[-1].step == 7 and 2 <= len(strip.frames) <= 5
    problems: list[str] = []
    assert read_strips(tmp_path, 1, problems) == [] and len(problems) == 1


def test_show_reduces_a_large_image() -> None:
    shown = show(Image.new("RGB", (4000, 1000)), "x")
    assert (shown.width, shown.height) == (1024, 256)
