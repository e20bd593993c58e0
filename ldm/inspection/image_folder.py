"""Problems of images and captions before they are encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.images.find import ImageItem
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.printable import escaped
from ldm.util import UserError

# Kinds of problems, the worst first, and their plural for a summary.
KINDS = {
    "unreadable": "cannot be read",
    "no caption": "without a caption",
    "cut": "with a caption that the text encoder cuts",
    "small": "smaller than the size",
    "duplicate": "equal to another image",
}


class Problem(NamedTuple):
    """Problem of an image: its name, one of `KINDS`, and a text."""

    name: str
    kind: str
    text: str


class _Seen(NamedTuple):
    """Digest of the pixels, height and width."""

    digest: bytes
    height: int
    width: int


def find_problems(items: Sequence[ImageItem], size: int | None = None) -> list[Problem]:
    """Return the problems of `items`, the worst first. Every image is decoded.

    Args:
        size: side in pixels of the squares that will be cropped; None for no check.
    """
    problems = [
        Problem(item.name, "no caption", "has no caption") for item in items if not (item.caption or item.error)
    ]
    problems += _cut_captions(items)
    first: dict[bytes, str] = {}
    for item in tqdm(items, unit="img", desc="inspecting"):
        try:
            seen = item.read(_seen)
        except UserError as error:
            reason = str(error).removeprefix(f"{escaped(item.name)}: ")
            problems.append(Problem(item.name, "unreadable", reason))
            continue
        if size is not None and min(seen.height, seen.width) < size:
            text = f"has {seen.width}x{seen.height} pixels and would be enlarged to {size}"
            problems.append(Problem(item.name, "small", text))
        if seen.digest in first:
            problems.append(Problem(item.name, "duplicate", f"has the same pixels as {first[seen.digest]}"))
        first.setdefault(seen.digest, item.name)
    order = list(KINDS)
    return sorted(problems, key=lambda problem: order.index(problem.kind))


def _seen(pixels: np.ndarray) -> _Seen:
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(f"{height} {width} ".encode() + np.ascontiguousarray(pixels).tobytes(), digest_size=16)
    return _Seen(digest.digest(), height, width)


def _cut_captions(items: Sequence[ImageItem]) -> list[Problem]:
    captions = list(dict.fromkeys(item.caption for item in items if item.caption))
    tokenizer = ClipTokenizer()
    cut = tokenizer.cut(captions)
    return [
        Problem(item.name, "cut", f"has a caption of {cut[item.caption]} tokens, of which {tokenizer.room} are read")
        for item in items
        if item.caption in cut
    ]


def summarise_problems(problems: Sequence[Problem], images: int) -> str:
    """Return one line with the number of `images`, and of the problems of each kind."""
    counts = {kind: sum(problem.kind == kind for problem in problems) for kind in KINDS}
    found = [f"{count} {KINDS[kind]}" for kind, count in counts.items() if count]
    return f"{images} image{'' if images == 1 else 's'}: {', '.join(found) or 'no problems'}"
