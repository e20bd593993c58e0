"""Damage to files of every kind, and files of no kind."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator

Corpus = Iterator[tuple[str, bytes]]

TERABYTE = 1 << 40


def damaged(whole: bytes, seed: str, count: int) -> Corpus:
    """`whole`; and `count` times cut short, with a bit turned, a stretch overwritten, left out, and repeated."""
    yield "whole", whole
    rng = random.Random(seed)
    for number in range(count):
        place, length = rng.randrange(len(whole)), rng.randint(1, 64)
        yield f"cut-{number}", whole[:place]
        turned = bytearray(whole)
        turned[place] ^= 1 << rng.randrange(8)
        yield f"bit-{number}", bytes(turned)
        junk = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
        yield f"junk-{number}", whole[:place] + junk + whole[place + length :]
        yield f"gap-{number}", whole[:place] + whole[place + length :]
        yield f"twice-{number}", whole[: place + length] + whole[place:]


def mistaken() -> Corpus:
    """Yield files that are of none of the expected kinds."""
    yield "empty", b""
    yield "null", bytes(4096)
    yield "noise", random.Random("noise").randbytes(4096)
    yield "page", b"<!DOCTYPE html><html>404</html>"
    yield "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "gzip", gzip.compress(bytes(1 << 20))
    yield "text", "ä".encode("latin1") * 100
    yield "elf", b"\x7fELF" + bytes(100)
