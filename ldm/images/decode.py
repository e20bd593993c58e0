"""Images of any kind that Pillow opens, as RGB; nothing that is broken or absurd gets through."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from ldm.util import UserError

# What photographs and drawings come in. Not all that Pillow reads: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")
# Images too, which must not go missing in silence.
UNREAD_EXTENSIONS = (
    "heic", "heif", "avif", "jxl", "jp2", "j2k", "jpx", "psd", "xcf", "svg", "eps", "ico", "tga", "dds", "exr", "hdr",
    "ppm", "pgm", "pbm", "pcx", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf",
)  # fmt: skip


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey is scaled, transparent parts become white, everything else is Pillow's conversion."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # "I;16", "I;16B", and "I", which 16-bit PNGs are read as by some versions
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("32-bit pixels have no agreed range")
        return Image.fromarray(np.round(levels / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The image in `data` the right way up (EXIF), uint8 RGB `(height, width, 3)`; of an animation, the first frame.

    Raises:
        UserError: it is not an image of the `FORMATS`, is broken, or has more pixels than Pillow's limit against
            decompression bombs (179 million); names `name`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image ({', '.join(FORMATS)})") from error
    except Exception as error:  # on broken files the decoders raise what they come across: OSError, SyntaxError...
        raise UserError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error
