"""Images, and what tells of them, that are broken or absurd."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
from PIL import Image

from tests.hostile.damage import TERABYTE, Corpus, damaged, mistaken


def png_of(width: int, height: int, colour: int = 2, depth: int = 8, data: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def images() -> Corpus:
    yield from mistaken()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        yield from ((f"{kind}-{name}", data) for name, data in damaged(file.getvalue(), kind, 15))
    yield "bomb", png_of(50_000, 50_000, data=bytes(1 << 22))
    yield "bomb-most", png_of((1 << 31) - 1, (1 << 31) - 1)
    yield "no-size", png_of(0, 0)
    yield "no-rows", png_of(4000, 4000, data=b"")
    text = zlib.compress(bytes(1 << 26))
    body = b"x\0\0" + text
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    yield "text-bomb", png_of(2, 2, data=bytes(14), extra=chunk)
    yield "ppm", b"P6 2 2 255 " + bytes(12)  # a kind that Pillow reads and this does not
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n(x) (w) file\n"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"


def lines() -> Corpus:
    """`metadata.jsonl` of a folder that holds `a.png`, `b.png` and `c.png`."""
    good, *others = (b'{"file_name": "%c.png", "text": "tom"}\n' % letter for letter in b"abc")
    yield from mistaken()
    yield from damaged(good + b"".join(others), "jsonl", 25)
    for name in ("../a.png", "/etc/passwd", "a/../../a.png", "..", "", "a\\u0000.png", "x" * 5000, "\\ud800.png"):
        yield f"name-{name[:12]}", b'{"file_name": "%s", "text": "x"}\n' % name.encode()
    for number, line in enumerate(
        (
            b"[" * 100_000,
            b'{"file_name": ' + b"9" * 5000 + b"}",
            b"NaN",
            b'{"file_name": ["a.png"]}',
            b'{"file_name": "a.png", "text": {"x": 1}}',
            b"null",
            b'"a.png"',
            '"a\u2028b\x85c.png"'.encode(),
            good,
        )
    ):
        yield f"line-{number}", good + line + b"\n"


def indexes() -> Corpus:
    """`index.json` of a folder that holds the shard `s-0.tar`."""
    good = json.dumps({"format": 1, "complete": True, "shards": [{"name": "s-0.tar", "samples": 1}]}).encode()
    yield from mistaken()
    yield from damaged(good, "index", 25)
    for number, shards in enumerate(
        (
            None,
            3,
            "s",
            {},
            [None],
            [3],
            ["s-0.tar"],
            [{}],
            [{"name": 3}],
            [{"name": ["s-0.tar"]}],
            [{"name": "../s-0.tar"}],
            [{"name": "s-0.tar", "bytes": "x"}],
            [{"name": "s-0.tar", "bytes": TERABYTE}],
            [{"name": "s-0.tar", "bytes": [1]}],
            [{"name": "\0"}],
            [{"name": None}],
            [{"name": ""}],
            [{"name": "s-0.tar"}, {"name": "s\n1.tar"}],
            [{"name": "s-0.tar", "bytes": "1\n2"}],
            [{"name": "s-0.tar", "sha256": 3}],
            [{"name": "s-0.tar", "sha256": [3]}],
            [{"name": "s-0.tar", "sha256": "0"}],
            [{"name": "s-0.tar", "sha256": "0\n1"}],
        )
    ):
        yield f"shards-{number}", json.dumps({"format": 1, "shards": shards}).encode()
    for number, digest in enumerate((3, [3], {}, "", "0", "0\n1", "0" * 100_000)):
        for key in ("autoencoder", "text_tower"):
            yield f"{key}-{number}", json.dumps({"shards": [{"name": "s-0.tar"}], key: digest}).encode()
    for number, value in enumerate((None, True, -3, 1.5, 10**400, float("nan"), "abc", {}, {"a": 1}, ["x"], [{}])):
        for key in ("format", "samples", "scale_factor", "failed", "made_from"):
            yield f"{key}-{number}", json.dumps({"shards": [{"name": "s-0.tar"}], key: value}).encode()
    yield "complete", json.dumps({"complete": "no", "shards": [{"name": "s-0.tar"}]}).encode()
    yield "deep", b"[" * 200_000
    yield "digits", b'{"shards": ' + b"9" * 5000 + b"}"
