"""Conversion of images to sRGB (IEC 61966-2-1) from the colour space of the file.

The colour space is given, in order of precedence, by `cICP` of a PNG (3rd edition, section 11.3.2); by an embedded ICC
profile; by `sRGB`, `gAMA` and `cHRM` of a PNG; by the primaries of a TIFF; or by Adobe RGB in EXIF (DCF 2.0). The
default is sRGB.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms

logger = logging.getLogger(__name__)

_SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x, y of white, red, green, blue
_ADOBE_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_ADOBE_GAMMA = 256 / 563
_SRGB_GAMMA = 1 / 2.2  # the gAMA value of sRGB's curve
# Primaries, and gamma (None for sRGB's curve), by their numbers in ITU-T H.273.
_CODED_PRIMARIES = {
    1: _SRGB_PRIMARIES,
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_CODED_CURVES = {1: None, 4: 1 / 2.2, 5: 1 / 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
_CODING = "cicp"  # key of these numbers in `Image.info`
# Bradford's cone responses (Lam 1985), for adaptation from one white point to another.
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_EXIF_IFD, _INTEROPERABILITY_IFD, _COLOUR_SPACE, _WHITE, _PRIMARIES = 0x8769, 0xA005, 0xA001, 318, 319
_SAME = 2  # levels of 255: a profile with smaller changes is treated as sRGB
_ROWS = 256  # rows per floating-point block
_MODES = {
    "RGB": ("RGB", "RGBA"),
    "GRAY": ("L", "LA"),
    "CMYK": ("CMYK",),
}  # modes of the image, by colour space of the profile
_said: set[str] = set()


def coding_of_png(data: bytes) -> dict[str, tuple[int, int]]:
    """Return the numbers of primaries and curve that a PNG's `cICP` has, under the key that `to_srgb` reads."""
    position = 8
    while position + 12 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if kind == b"cICP" and length == 4:
            return {_CODING: (data[position + 8], data[position + 9])}
        if kind == b"IDAT":
            break
        position += 12 + length
    return {}


def to_srgb(image: Image.Image, name: str) -> Image.Image:
    """Convert `image`, in mode L, LA, RGB, RGBA or CMYK, to sRGB in mode RGB, or RGBA if it has alpha.

    An image in sRGB or without a colour space is returned unchanged. An invalid profile is ignored with a warning that
    names `name`.
    """
    profile = image.info.get("icc_profile")
    try:
        primaries, curve = image.info.get(_CODING, (None, None))
        if profile and not (primaries in _CODED_PRIMARIES and curve in _CODED_CURVES):
            return _by_profile(image, profile)
        if image.mode == "CMYK":
            return image
        space = _described_space(image)
        return _by_primaries(image, *space) if space else image
    except (ImageCms.PyCMSError, OSError, ValueError, ArithmeticError, TypeError, np.linalg.LinAlgError) as error:
        digest = hashlib.sha256(profile or repr(error).encode()).hexdigest()
        if digest not in _said:
            _said.add(digest)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            logger.warning("%s: colour profile ignored and sRGB assumed: %s", name, reason)
        return image


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    colours = _colours_of(profile)
    if image.mode in ("L", "LA") and colours == "RGB":
        image = image.convert("RGBA" if image.mode == "LA" else "RGB")
    if image.mode in ("RGB", "RGBA") and colours == "GRAY" and _is_grey(image):
        image = image.convert("LA" if image.mode == "RGBA" else "L")
    if image.mode not in _MODES.get(colours, ()):
        raise ValueError(f"its colour space is {colours or 'unknown'}, but the image is {image.mode}")
    if _is_srgb(profile):
        return image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if image.mode == "LA":
        image = image.getchannel("L")
    # The transformation keeps the fourth channel of RGBA.
    transformed = ImageCms.applyTransform(image, _transform(profile, image.mode))
    if alpha is not None:
        transformed.putalpha(alpha)
    return transformed


def _is_grey(image: Image.Image) -> bool:
    """Return True if the colours of `image`, RGB or RGBA, are all grey, as those of a grey palette."""
    red, *others = (image.getchannel(band) for band in "RGB")
    return all(ImageChops.difference(red, other).getbbox() is None for other in others)


def _open(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


@lru_cache(maxsize=32)
def _colours_of(profile: bytes) -> str:
    return _open(profile).profile.xcolor_space.strip()


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        _open(profile),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGBA" if mode == "RGBA" else "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


@lru_cache(maxsize=32)
def _is_srgb(profile: bytes) -> bool:
    """Return True if the profile maps a grid of colours like sRGB."""
    colours = _colours_of(profile)
    if colours == "CMYK":
        return False
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if colours == "GRAY":
        grid, mode = np.tile(levels, (1, 1)), "L"
        expected = np.stack([grid] * 3, axis=-1)
    else:
        grid = expected = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        mode = "RGB"
    made = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), _transform(profile, mode)))
    return int(np.abs(made.astype(int) - expected).max()) <= _SAME


def _described_space(image: Image.Image) -> tuple[float | None, Sequence[float]] | None:
    """Return gamma (None for sRGB's curve) and primaries of an image without a profile, or None if it is sRGB."""
    info = image.info
    if _CODING in info:
        return _coded_space(*info[_CODING])
    if "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        gamma, primaries = info.get("gamma"), info.get("chromaticity", _SRGB_PRIMARIES)
    elif hasattr(image, "tag_v2") and _PRIMARIES in image.tag_v2:
        primaries = (*image.tag_v2.get(_WHITE, _SRGB_PRIMARIES[:2]), *image.tag_v2[_PRIMARIES])
        gamma = None
    elif _is_adobe_rgb(image.getexif()):
        gamma, primaries = _ADOBE_GAMMA, _ADOBE_PRIMARIES
    else:
        return None
    primaries = [float(value) for value in primaries]
    if gamma is not None and not 0.1 <= gamma <= 10:
        raise ValueError(f"a gamma of {gamma:g}, outside of 0.1 to 10")
    if len(primaries) != 8:
        raise ValueError(f"primaries of {len(primaries)} coordinates")
    is_srgb_curve = gamma is None or abs(gamma - _SRGB_GAMMA) < 0.01
    is_srgb = is_srgb_curve and np.allclose(primaries, _SRGB_PRIMARIES, atol=0.003)
    return None if is_srgb else (gamma, primaries)


def _coded_space(primaries: int, curve: int) -> tuple[float | None, Sequence[float]] | None:
    if primaries not in _CODED_PRIMARIES or curve not in _CODED_CURVES:
        raise ValueError(f"its coding {primaries}/{curve} (ITU-T H.273) is not known, or for a wider range of light")
    gamma = _CODED_CURVES[curve]
    return None if primaries == 1 and gamma is None else (gamma, _CODED_PRIMARIES[primaries])


def _is_adobe_rgb(exif: Image.Exif) -> bool:
    """Return True if EXIF declares Adobe RGB: by its number, or by the number for uncalibrated and the index R03."""
    space = exif.get_ifd(_EXIF_IFD).get(_COLOUR_SPACE)
    index = ""
    with suppress(KeyError):  # Pillow 12.3 raises it if the tag is missing
        index = exif.get_ifd(_INTEROPERABILITY_IFD).get(1, "")
    index = index.decode("ascii", "replace") if isinstance(index, bytes) else str(index)
    return space == 2 or (space == 0xFFFF and index.rstrip("\0 ") == "R03")


def _to_xyz(primaries: Sequence[float]) -> np.ndarray:
    """Return the matrix (3, 3) from linear RGB to XYZ (SMPTE RP 177-1993)."""
    xy = np.asarray(primaries, dtype=np.float64).reshape(4, 2)
    if (xy[:, 1] < 1e-3).any():
        raise ValueError("invalid primaries")
    xyz = np.stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(1)) / xy[:, 1]])  # X Y Z of white, red, green, blue
    return xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])


def _to_linear_srgb(primaries: Sequence[float]) -> np.ndarray:
    """Return the matrix (3, 3) from linear RGB of `primaries` to linear sRGB, with adapted white point."""
    source, target = _to_xyz(primaries), _to_xyz(_SRGB_PRIMARIES)
    cones = [_BRADFORD @ matrix.sum(1) for matrix in (target, source)]
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(cones[0] / cones[1]) @ _BRADFORD
    return np.linalg.inv(target) @ adapted @ source


def _by_primaries(image: Image.Image, gamma: float | None, primaries: Sequence[float]) -> Image.Image:
    """Convert `image` from the given `primaries` and `gamma` to sRGB. A gamma of None stands for sRGB's curve."""
    matrix = _to_linear_srgb(primaries)
    if not np.isfinite(matrix).all():
        raise ValueError("invalid primaries")
    values = np.arange(256) / 255
    curve = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    light = (curve if gamma is None else values ** (1 / gamma)).astype(np.float32)
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    pixels = np.array(image.convert("RGB"))
    for top in range(0, len(pixels), _ROWS):
        linear = np.clip(light[pixels[top : top + _ROWS]] @ matrix.T.astype(np.float32), 0, 1)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        pixels[top : top + _ROWS] = np.round(encoded * 255)
    converted = Image.fromarray(pixels)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
