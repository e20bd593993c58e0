"""Arrays and tars of samples that are broken, absurd, or would run what they hold."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.hostile.damage import TERABYTE, Corpus, damaged, mistaken


def npy_of(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(header)) + header + data


def npy_header(descr: str = "'<f2'", shape: str = "(8, 4, 4)", order: str = "False") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def whole_npy(shape: tuple[int, ...] = (8, 4, 4)) -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(np.prod(shape), dtype=np.float16).reshape(shape) / 64)
    return file.getvalue()


def arrays(marker: Path) -> Corpus:
    yield from mistaken()
    yield from damaged(whole_npy(), "npy", 60)
    data = bytes(256)
    payload = b"cos\nsystem\n(Vtouch " + str(marker).encode() + b"\ntR."
    yield "pickled", npy_of(npy_header("'|O'", "(1,)"), payload)
    yield "pickle", payload
    for shape in (
        f"({TERABYTE},)",
        "(-8, -4, 4)",
        "(0,)",
        "()",
        "(8, 4, 4, 1e0)",
        "(8.0, 4, 4)",
        "8",
        "(1 << 40,)",
        "(True,)",
        "(" * 90,
        "(8, 4, 4" + "0" * 5000 + ")",
        f"({1 << 63}, 2)",
        f"({1 << 32}, {1 << 32})",
    ):
        yield f"shape-{shape[:20]}", npy_of(npy_header(shape=shape), data)
    for descr in (
        "'|V2'",
        "'<U4'",
        "'<M8'",
        "'<c8'",
        "'(2,)<f2'",
        "[('a', '<f2')]",
        "'<f2,<f2'",
        "'<i8'",
        "None",
        "'<f3'",
    ):
        yield f"descr-{descr[:20]}", npy_of(npy_header(descr), data)
    yield "code", npy_of(b"__import__('os').system('touch " + str(marker).encode() + b"')\n", data)
    yield "deep", npy_of(b"-" * 400 + b"1\n", data)
    yield "nan", npy_of(npy_header(), b"\xff" * 256)
    yield "version", npy_of(npy_header(), data, b"\x09\x00")
    yield "header-huge", b"\x93NUMPY\x02\x00" + struct.pack("<I", (1 << 32) - 1) + data


def tar_of(members: Sequence[tuple[str | tarfile.TarInfo, bytes]], kind: int = tarfile.PAX_FORMAT, **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, **options) as tar:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax
    return info


def claiming(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a lone header of a member that claims `size` bytes."""
    info = member(name, kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


SAMPLE = [("0.f8.npy", whole_npy()), ("0.t5.npy", whole_npy((7, 6))), ("0.txt", b"a tom")]


def tars(members: Sequence[tuple[str, bytes]]) -> Corpus:
    """Tars of samples with `members`, hurt as tars are; what is in the members is hurt elsewhere."""
    yield from mistaken()
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        whole = tar_of(
            [(name.replace("0", str(sample), 1), data) for sample in range(3) for name, data in members], kind
        )
        yield from (
            (f"{kind}-{name}", data) for name, data in damaged(whole.rstrip(b"\0") + bytes(1024), f"tar {kind}", 25)
        )
    good, end = tar_of(members).rstrip(b"\0"), bytes(1024)
    good += bytes(-len(good) % 512)
    for name in ("../0.txt", "/etc/0.txt", "a/../../0.txt", "..\\0.txt", "\\0.txt"):
        yield f"name-{name}", tar_of([*members, (name, b"x")])
    for number, (kind, link) in enumerate(
        (
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, members[0][0]),
            (tarfile.CHRTYPE, ""),
            (tarfile.BLKTYPE, ""),
            (tarfile.FIFOTYPE, ""),
            (tarfile.GNUTYPE_SPARSE, ""),
            (b"Z", ""),
        )
    ):
        yield f"type-{number}", tar_of([*members, (member("1.txt", kind, link), b"")])
    yield "twice", tar_of([*members, members[0]])
    for number, size in enumerate((TERABYTE, 1 << 62, 1 << 86, -512, -1024)):
        yield f"size-{number}", good + claiming("1.txt", size) + end
        yield f"pax-size-{number}", tar_of([*members, (member("1.txt", size=str(size)), b"x")])
        for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            yield f"header-{number}-{kind!r}", good + claiming("x", size, kind) + end
    yield "headers", good + claiming("x", 0, tarfile.XHDTYPE) * 3000 + end
    yield "pax-slow", good + claiming("x", 1 << 14, tarfile.XHDTYPE) + b"1" * (1 << 14) + end
    yield (
        "sparse-pax",
        tar_of(
            [
                *members,
                (
                    member(
                        "1.txt",
                        **{
                            "GNU.sparse.major": "1",
                            "GNU.sparse.minor": "0",
                            "GNU.sparse.name": "1.txt",
                            "GNU.sparse.realsize": str(TERABYTE),
                        },
                    ),
                    b"1\n0\n1\n" + bytes(1024),
                ),
            ]
        ),
    )
    yield "no-end", good
    yield "hidden-behind-the-end", good + end + good + end
    yield "long-name", tar_of([*members, ("k" * 100_000 + ".txt", b"x")])
    yield "bomb", gzip.compress(good + claiming("1.txt", 1 << 31) + bytes(1 << 24))
    yield "bomb-header", gzip.compress(good + claiming("x", 1 << 31, tarfile.XHDTYPE) + bytes(1 << 24))
