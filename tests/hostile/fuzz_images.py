"""Images of loss masks for the fuzzer: their transparency and brightness, as Pillow reads them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldm.images.decode import FORMATS, decode_alpha, decode_grey, has_transparency

_SIZE = (5, 3)


def make_mask(rng: random.Random) -> bytes:
    """Return an image in grey or colour, with or without transparency."""
    kind, mode = rng.choice(
        [("PNG", "LA"), ("PNG", "RGBA"), ("TIFF", "RGBA"), ("PNG", "L"), ("WEBP", "RGBA"), ("JPEG", "L")]
    )
    size = _SIZE[0] * _SIZE[1] * len(Image.new(mode, (1, 1)).getbands())
    file = io.BytesIO()
    Image.frombytes(mode, _SIZE, rng.randbytes(size)).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def read_mask(folder: Path, data: bytes) -> list[object]:
    """Return opacity, or brightness where no pixel is transparent, as this program reads them."""
    if has_transparency(data, "x"):
        return _plain(decode_alpha(data, "x"))
    return _plain(decode_grey(data, "x"))


def load_mask(data: bytes) -> list[object]:
    """Return the same as Pillow reads it."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        return _plain((alpha if alpha.min() < 255 else np.asarray(image.convert("L"))) / 255)


def _plain(values: np.ndarray) -> list[object]:
    return [list(values.shape), np.round(values * 255).astype(int).ravel().tolist()]
