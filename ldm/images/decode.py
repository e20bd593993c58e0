"""Images of any kind that Pillow opens, as sRGB; nothing that is broken or absurd gets through."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from ldm.images.profiles import to_srgb
from ldm.images.turns import LARGE, Turn
from ldm.util import UserError

# What photographs and drawings come in. Not all that Pillow reads: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")
# Images too, which must not go missing in silence.
UNREAD_EXTENSIONS = (
    "heic", "heif", "avif", "jxl", "jp2", "j2k", "jpx", "psd", "xcf", "svg", "eps", "ico", "tga", "dds", "exr", "hdr",
    "ppm", "pgm", "pbm", "pcx", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf",
)  # fmt: skip

_BAND = 256  # rows that are converted at a time: a large image is in memory once as decoded, and once as RGB
# Each scan of a JPEG is a pass over all of its pixels. Programs write about ten.
_MOST_SCANS, _MOST_SCANNED = 100, 4_000_000_000  # scans; pixels of all scans
_SCAN_ENDS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the next marker that is part of no compressed data
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length
_SCAN, _END = 0xDA, 0xD9
_TILE_TAGS, _ROWS_PER_STRIP = (322, 323), 278  # of a TIFF


def decode_image(data: bytes, name: str, turn: Turn | None = None) -> np.ndarray:
    """Return the image in `data` the right way up (EXIF), sRGB, uint8 `(height, width, 3)`; of an animation, the first
    frame.

    Args:
        turn: taken before a large image is decoded.

    Raises:
        UserError: it is not an image of the `FORMATS`, is broken, or has more pixels than Pillow's limit against
            decompression bombs (179 million); names `name`.
    """
    return _decoded(data, name, turn, lambda image: _pixels(image, name))


def decode_grey(data: bytes, name: str) -> np.ndarray:
    """Return the brightness of an image that stands for numbers, float32 `(height, width)` from 0 to 1.

    16 bits are kept, and no colour profile is applied. Transparent pixels are white.

    Raises:
        UserError: as `decode_image`.
    """
    return _decoded(data, name, None, _brightness)


def _decoded(data: bytes, name: str, turn: Turn | None, then: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header alone
            _check_size(image, data)
            if turn is not None and image.width * image.height > LARGE:
                turn.take()
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return then(image)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image ({', '.join(FORMATS)})") from error
    except Exception as error:  # on broken files the decoders raise what they come across: OSError, SyntaxError...
        raise UserError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """Return uint8 `(height, width, 3)`, with as few copies of the pixels as can be."""
    image = to_srgb(_to_eight_bits(image), name)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        pixels[top : top + _BAND] = _on_white(band)
    return pixels


def _on_white(image: Image.Image) -> Image.Image:
    """Return `image` in RGB, what is transparent on white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _brightness(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return (_sixteen_bits(image) / 0xFFFF).astype(np.float32)
    return np.asarray(_on_white(_to_eight_bits(image)).convert("L"), dtype=np.float32) / 255


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image)  # of "I;16", "I;16B", and "I", which 16-bit PNGs are read as by some versions
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no agreed range")
    return levels


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return `image` in one of the modes L, LA, RGB, RGBA and CMYK: 16-bit grey is scaled, palettes are resolved."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        levels = _sixteen_bits(image)
        eight_bits = np.empty(levels.shape, np.uint8)
        for top in range(0, len(levels), _BAND):
            eight_bits[top : top + _BAND] = np.round(levels[top : top + _BAND] / 257)
        scaled = Image.fromarray(eight_bits)
        scaled.info = image.info
        return scaled
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def _check_size(image: Image.Image, data: bytes) -> None:
    """Raise `ValueError` for an image that takes far more memory or time than its size in pixels tells."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        scans = _count_scans(data)
        if scans > _MOST_SCANS or scans * pixels > _MOST_SCANNED:
            raise ValueError(f"a JPEG of {image.width}x{image.height} pixels in {scans} scans; save it again")
    if image.format == "TIFF":
        rows = image.tag_v2.get(_ROWS_PER_STRIP, 0)
        tile = [image.tag_v2.get(tag, 0) for tag in _TILE_TAGS]
        largest = max(tile[0] * tile[1], min(rows, image.height) * image.width)
        if largest > 2 * Image.MAX_IMAGE_PIXELS:  # the limit for whole images
            raise ValueError(f"a TIFF with tiles of {tile[0]}x{tile[1]} pixels: could be a decompression bomb")


def _count_scans(data: bytes) -> int:
    """Return the number of scans in a JPEG; counts no more than are too many."""
    position, scans = 2, 0
    while scans <= _MOST_SCANS and position + 4 <= len(data):
        if data[position] != 0xFF:
            found = _SCAN_ENDS.search(data, position)
            if found is None:
                break
            position = found.start()
        marker = data[position + 1]
        if marker == _END:
            break
        if marker == 0xFF or marker in _ALONE:
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _SCAN:
            scans += 1
            found = _SCAN_ENDS.search(data, position)
            if found is None:
                break
            position = found.start()
    return scans
