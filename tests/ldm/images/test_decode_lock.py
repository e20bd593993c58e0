"""Large images are decoded one at a time in all processes."""

import multiprocessing
import struct

import numpy as np
import pytest
from PIL import Image

from ldm.images import decode, decode_lock, find
from ldm.images.decode import decode_image
from ldm.images.decode_lock import DecodeLock
from ldm.images.find import ImageItem
from ldm.util import UserError
from tests.ldm.images.test_decode import encoded, gradient
from tests.waiting import join, wait_for


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_lock, "lock_path", lambda: tmp_path / "lock")


def hold(connection):
    with DecodeLock() as lock:
        lock.take()
        connection.send("has it")
        connection.recv()


def wait(connection):
    with DecodeLock() as lock:
        lock.take()
        lock.take()  # which changes nothing
        connection.send("has it")


def test_turn_is_given_to_one_process_and_comes_back_from_a_dead_one():
    context = multiprocessing.get_context("fork")
    (ours, theirs), (second, other) = multiprocessing.Pipe(), multiprocessing.Pipe()
    holder = context.Process(target=hold, args=(theirs,))
    holder.start()
    assert wait_for(ours.poll, holder) and ours.recv() == "has it"
    waiter = context.Process(target=wait, args=(other,))
    waiter.start()
    assert not second.poll(0.5)
    holder.kill()
    assert wait_for(second.poll, waiter) and second.recv() == "has it"
    assert join(holder, waiter) == [-9, 0]


def test_turn_does_not_wait_where_there_can_be_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_lock, "lock_path", lambda: tmp_path / "nowhere/lock")
    with DecodeLock() as lock:
        lock.take()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_decode_image_takes_the_turn_before_it_decodes(kind, monkeypatch, tmp_path):
    (tmp_path / "x").write_bytes(encoded(Image.fromarray(gradient(20, 20)), kind))
    happened = []
    monkeypatch.setattr(DecodeLock, "take", lambda self: happened.append("turn"))
    monkeypatch.setattr(DecodeLock, "__exit__", lambda self, *_: happened.append("over"))
    pixels = decode._pixels
    monkeypatch.setattr(decode, "_pixels", lambda *arguments: happened.append("decoded") or pixels(*arguments))
    item = ImageItem("x", tmp_path / "x")
    item.read(lambda pixels: happened.append("fitted"))
    assert happened == ["decoded", "fitted", "over"]
    happened.clear()
    monkeypatch.setattr(decode, "LARGE", 399)
    item.read(lambda pixels: happened.append("fitted"))
    assert happened == ["turn", "decoded", "fitted", "over"]
    happened.clear()
    monkeypatch.setattr(find, "LARGE_FILE", 10)
    monkeypatch.setattr(decode, "LARGE", 400)
    item.read(lambda pixels: happened.append("fitted"))
    assert happened == ["turn", "decoded", "fitted", "over"]


def test_decode_image_bounds_the_scans_of_a_jpeg():
    file = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    progressive = encoded(Image.fromarray(gradient(64, 64)), "JPEG", progressive=True)
    assert decode._count_scans(file) == 1 and 5 <= decode._count_scans(progressive) <= 12
    scan = progressive.rindex(b"\xff\xda")
    assert decode._count_scans(progressive + progressive[scan:] * 500) == decode._count_scans(progressive)
    endless = progressive[:-2] + progressive[scan:-2] * 500 + b"\xff\xd9"
    with pytest.raises(UserError, match=r"x: a JPEG of 64x64 pixels in 101 scans; save it again"):
        decode_image(endless, "x")
    assert decode_image(progressive[:-2] + progressive[scan:-2] * 5 + b"\xff\xd9", "x").shape == (64, 64, 3)


def test_decode_image_refuses_absurd_tiles_of_a_tiff():
    def tiled(side):
        values = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 277: 1, 322: side, 323: 16, 324: 200, 325: 256}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
        head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4)
        return head + bytes(200 - len(head)) + bytes(range(256))

    assert decode_image(tiled(16), "x").shape == (16, 16, 3)
    with pytest.raises(UserError, match="x: a TIFF with tiles of 2147483632x16 pixels"):
        decode_image(tiled((1 << 31) - 16), "x")
