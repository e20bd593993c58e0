"""Folders and tars of images with all that they may have, and the comparison of their stream with a list."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.image_sources import find_images
from ldm.encoding.image_stream import open_images
from ldm.util import UserError
from tests.ldm.encoding.toy_encoder import image


def png(colour: str = "red", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (20, 16), colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, count: int = 3, each: int = 3) -> Path:
    """Write tars as img2dataset does, of which one image is damaged and one has no caption."""
    for tar in range(count):
        members = {}
        for number in range(tar * each, (tar + 1) * each):
            members[f"{number:04d}.png"] = b"?" if number == 1 else png()
            members |= {} if number == 2 else {f"{number:04d}.txt": b"x" * number + b" "}
            members[f"{number:04d}.json"] = b"{}"
        write_tar(folder / f"{tar:05d}.tar", members)
    (folder / "00000.parquet").write_bytes(b"")
    return folder


def write_tree(folder: Path) -> Path:
    """Write folders of images with all that a folder may have, except for what is read as a whole."""
    for name in ("b/a.png", "b.png", "b/c/a.JPG", "a.b/x.png", "a/x.png", "a/é.png", "3_c/y.webp", "z.gif", "z.heic"):
        image(folder / "tmp.png", caption=None)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tmp.png").rename(folder / name)
    for name in ("b/a.txt", "b.caption", "a.b/x.png.txt", "3_c/y.txt", "a/e\u0301.txt", "alone.txt", "b/alone2.txt"):
        (folder / name).write_text(f"caption of {name}")
    (folder / "z.txt").write_bytes(b"\xff\xff")
    (folder / "b.json").write_text("{}")
    (folder / "b/c/notes.doc").write_text("x")
    (folder / "a.mask.png").write_bytes(png())
    (folder / ".hidden.png").write_bytes(png())
    (folder / ".git").mkdir()
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "link.png").symlink_to("b.png")
    (folder / "loop").symlink_to("loop")
    return folder


def write_list(folder: Path) -> Path:
    """Write a tree whose metadata file lists images in an order of its own, and not all of them."""
    write_tree(folder)
    for path in ("gone.png", "loop", "link.png"):
        (folder / path).unlink()
    for name in ("b/IMG.PNG", "b/unlisted.png", "other.png", "c/none.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png("blue"))
    names = ["b/IMG.png", "b.png", "a/e\u0301.png", "missing.png", ".git/hidden.png", "z.gif", "a/x.png", "b/c/a.jpg"]
    captions = [None, "b", "e", "m", "h", None, " a  x ", "c"]
    (folder / "b/IMG.txt").write_text("a text file")
    (folder / ".git/hidden.png").write_bytes(png())
    entries = [{"file_name": name, "text": text, "odd": 1} for name, text in zip(names, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    (folder / "metadata.csv").write_text("file_name,text\n")
    return folder


def write_lists(folder: Path) -> Path:
    """Write folders of which two have a metadata file and one has none."""
    write_list(folder / "m")
    write_tree(folder / "a")
    (folder / "z").mkdir()
    for name in ("2", "10", "1"):
        (folder / f"z/{name}.png").write_bytes(png())
    lines = ["file,caption", "2.png,two", "10.png,", '1.png,"one, and']
    (folder / "z/metadata.csv").write_text("\r\n".join(lines) + '\r\nonly"\r\n')
    for path in folder.glob("a/*"):
        if path.is_symlink() and not path.exists():
            path.unlink()
    (folder / "a/loop").unlink(missing_ok=True)
    return folder


def write_links(folder: Path) -> Path:
    """Write a tree with links to folders, of which some lead to the same one, or around."""
    write_tree(folder)
    outside = folder.with_name(f"{folder.name}-outside")
    for name in ("one/x.png", "one/deep/y.png", "two/v.png"):
        image(outside / name, caption=name)
    (outside / "one/further").symlink_to(outside / "two")
    (outside / "one/back").symlink_to(folder)
    for name in ("z-one", "a-one", "b/also-one"):
        (folder / name).symlink_to(outside / "one")
    (folder / "again").symlink_to(folder / "b")
    (folder / "b/two").symlink_to(outside / "two")
    return folder


def write_pairs_and_masks(folder: Path) -> Path:
    """Write a tree with edited images and masks, of which some belong to several images, to others, or to none."""
    names = """a.png a.edited.png a.mask.png b.jpg b.edited.png b.edited.webp b.mask.gif c.png c.jpg c.edited.png
    c.mask.png d.edited.png d.mask.png e.png e/e.png e/e.mask.png e/b.edited.png e/E\u0301.PNG e/é.edited.png
    e/é.mask.jpg f.mask.png f/x.png f/x.MASK.PNG f/x.Edited.PNG f/y.mask.mask.png f/y.mask.png
    g/only.edited.png g.mask.d/z.png g/.mask.png"""
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "a.edited.txt").write_bytes(b"\xff")
    (folder / "e.txt").unlink()
    (folder / "unused.txt").write_text("x")
    return folder


def compare(caplog: pytest.LogCaptureFixture, sources: list[Path], **options: object) -> int:
    """Assert that a stream has the items and warnings of a list. Return the number of images."""
    caplog.set_level(logging.WARNING)
    names = list(map(str, sources))
    caplog.clear()
    expected = find_images(names, **options)
    said = sorted(caplog.messages)
    caplog.clear()
    stream = open_images(names, **options)
    assert stream is not None and list(stream) == expected and sorted(caplog.messages) == said
    assert list(stream) == expected, "another iteration reads them again"
    return len(expected)


def assert_refused_alike(folder: Path, **options: object) -> None:
    """Assert that the images of `folder` are refused with one message, as a stream and as a list."""
    with pytest.raises(UserError) as expected:
        find_images([str(folder)], **options)
    with pytest.raises(UserError) as found:
        open_images([str(folder)], **options)
    assert str(found.value) == str(expected.value)
