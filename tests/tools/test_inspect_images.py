"""Tests of tools/inspect_images.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from PIL import Image

TOOL = Path(__file__).resolve().parents[2] / "tools/inspect_images.py"


def test_inspect_images_prints_and_writes_problems(run_tool, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    images = tmp_path / "-images"
    images.mkdir()
    Image.new("RGB", (32, 32)).save(images / "new\nline.png")
    (images / "broken.png").write_bytes(b"x")
    out = tmp_path / "out/problems.json"
    assert run_tool(TOOL, images, "--size", 64, "--json", out) is None
    assert "small: new\nline.png: has 32x32 pixels and would be enlarged to 64" in caplog.messages
    assert caplog.messages[-1] == "2 images: 1 cannot be read, 2 without a caption, 1 smaller than the size"
    found = json.loads(out.read_text())
    assert found["images"] == 2
    assert {"name": "new\nline.png", "kind": "no caption", "text": "has no caption"} in found["problems"]


def test_inspect_images_refuses_a_missing_folder(run_tool, tmp_path: Path) -> None:
    assert "missing" in run_tool(TOOL, tmp_path / "missing")
    assert (
        run_tool(TOOL, tmp_path, "--size", 0) == "error: --size 0: give a whole number of at least 1, or leave it out"
    )
