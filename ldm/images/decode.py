"""Decoding of images to sRGB with Pillow, with checks against damaged files and decompression bombs."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldm.images.colour_profiles import coding_of_png, to_srgb
from ldm.images.decode_lock import LARGE, DecodeLock
from ldm.util import UserError

# Formats of photographs and drawings. Pillow reads more, but EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")
# Extensions of unsupported images. They give an error, so that no image is lost unnoticed.
UNREAD_EXTENSIONS = (
    "heic", "heif", "avif", "jxl", "jp2", "j2k", "jpx", "psd", "xcf", "svg", "eps", "ico", "tga", "dds", "exr", "hdr",
    "ppm", "pgm", "pbm", "pcx", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf",
)  # fmt: skip
_KNOWN = frozenset((*EXTENSIONS, *UNREAD_EXTENSIONS))

_BAND = 256  # rows per conversion, so that a large image is in memory only as decoded and as RGB
# Limits for JPEG. Each scan processes all pixels, and programs write about ten scans.
_MOST_SCANS, _MOST_SCANNED = 100, 4_000_000_000  # scans, and total pixels of all scans
_SCAN_ENDS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the next marker outside of compressed data
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length field
_SCAN, _END = 0xDA, 0xD9
_TILE_TAGS, _ROWS_PER_STRIP = (322, 323), 278  # tags of a TIFF


def extension_of(path: Path | str) -> str:
    """Return the extension of `path` in lower case without the dot."""
    text = os.fspath(path)  # not by a `Path` of each name, of which folders may have millions
    name = text[text.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[dot + 1 :].lower() if 0 < dot < len(name) - 1 else ""


def is_image(path: Path | str) -> bool:
    """Return True if `path` has the extension of a supported or unsupported image."""
    return extension_of(path) in _KNOWN


def decode_image(data: bytes, name: str, lock: DecodeLock | None = None) -> np.ndarray:
    """Return the image in `data` as sRGB, uint8 (height, width, 3), after the EXIF rotation.

    From an animation, return the first frame.

    Args:
        lock: taken before a large image is decoded.

    Raises:
        UserError: the format is not one of `FORMATS`, the image is damaged, or it has more pixels than Pillow's limit
            against decompression bombs (179 million). The message names `name`.
    """
    return _decoded(data, name, lock, lambda image: _pixels(image, name))


def decode_grey(data: bytes, name: str, lock: DecodeLock | None = None) -> np.ndarray:
    """Return the brightness of an image that stands for numbers, float32 `(height, width)` from 0 to 1.

    16 bits are kept, and no colour profile is applied. Transparent pixels are white.

    Raises:
        UserError: as `decode_image`.
    """
    return _decoded(data, name, lock, _brightness)


def decode_alpha(data: bytes, name: str, lock: DecodeLock | None = None) -> np.ndarray:
    """Return the opacity of an image with an alpha channel, float32 `(height, width)` from 0 to 1.

    Raises:
        UserError: as `decode_image`.
    """
    return _decoded(data, name, lock, _opacity)


def has_transparency(data: bytes, name: str, lock: DecodeLock | None = None) -> bool:
    """Return True if the image has transparent pixels. An image without an alpha channel is not decoded.

    Raises:
        UserError: as `decode_image`.
    """
    with _opened(data, name) as image:
        if image.mode.startswith("I") or not ("A" in image.getbands() or "transparency" in image.info):
            return False
        _load(image, lock)
        return image.convert("RGBA").getextrema()[3][0] < 255


def _decoded(data: bytes, name: str, lock: DecodeLock | None, then: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    with _opened(data, name) as image:
        _load(image, lock)
        if image.format == "PNG":
            image.info |= coding_of_png(data)
        ImageOps.exif_transpose(image, in_place=True)
        return then(image)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Read the header of an image, and check the size. Errors in the block become `UserError`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, data)
            yield image
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image ({', '.join(FORMATS)})") from error
    except MemoryError as error:
        raise UserError(f"{name}: this machine has too little memory left to decode it") from error
    except Exception as error:  # on damaged files, decoders raise OSError, SyntaxError, ...
        raise UserError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _load(image: Image.Image, lock: DecodeLock | None) -> None:
    if lock is not None and image.width * image.height > LARGE:
        lock.take()
    image.load()


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """Return the pixels as uint8 (height, width, 3), with few copies."""
    image = to_srgb(_to_eight_bits(image), name)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        pixels[top : top + _BAND] = _on_white(band)
    return pixels


def _on_white(image: Image.Image) -> Image.Image:
    """Return `image` in RGB, with transparent parts on white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _brightness(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return (_sixteen_bits(image) / 0xFFFF).astype(np.float32)
    return np.asarray(_on_white(_to_eight_bits(image)).convert("L"), dtype=np.float32) / 255


def _opacity(image: Image.Image) -> np.ndarray:
    return np.asarray(_to_eight_bits(image).convert("RGBA").getchannel("A"), dtype=np.float32) / 255


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image)  # "I;16", "I;16B", and in some versions of Pillow "I" for 16-bit PNGs
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError("32-bit pixels have no standard range")
    return levels


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return `image` in mode L, LA, RGB, RGBA or CMYK. 16-bit grey is scaled, and palettes are resolved."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no standard range")
    if image.mode.startswith("I"):
        levels = _sixteen_bits(image)
        eight_bits = np.empty(levels.shape, np.uint8)
        for top in range(0, len(levels), _BAND):
            eight_bits[top : top + _BAND] = np.round(levels[top : top + _BAND] / 257)
        scaled = Image.fromarray(eight_bits)
        scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
        if "transparency" in image.info:  # a level of 16 bits
            scaled.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
        return scaled
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def _check_size(image: Image.Image, data: bytes) -> None:
    """Raise `ValueError` for an image that needs much more memory or time than its size suggests."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        scans = _count_scans(data)
        if scans > _MOST_SCANS or scans * pixels > _MOST_SCANNED:
            raise ValueError(f"a JPEG of {image.width}x{image.height} pixels in {scans} scans; save it again")
    if image.format == "TIFF":
        rows = image.tag_v2.get(_ROWS_PER_STRIP, 0)
        tile = [image.tag_v2.get(tag, 0) for tag in _TILE_TAGS]
        largest = max(tile[0] * tile[1], min(rows, image.height) * image.width)
        if largest > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow's limit for images
            raise ValueError(f"a TIFF with tiles of {tile[0]}x{tile[1]} pixels: could be a decompression bomb")


def _count_scans(data: bytes) -> int:
    """Return the number of scans in a JPEG, counted up to the limit."""
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
