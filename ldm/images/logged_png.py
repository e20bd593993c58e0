"""Reading of the images that a training logged. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ldm.files import open_file
from ldm.util import UserError

_MOST_PIXELS = 1 << 26


def read_logged_png(path: Path) -> Image.Image:
    """Return the image in the PNG file at `path`, in RGB. A run folder may come from elsewhere.

    Raises:
        UserError: the file is not a readable PNG, or too large.
    """
    try:
        # Only PNG: for some formats, Pillow starts other programs.
        with open_file(path) as file, Image.open(file, formats=("PNG",)) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels")
            return image.convert("RGB")
    except Image.UnidentifiedImageError:
        raise UserError("not a PNG") from None
    except Exception as error:  # on damaged files, decoders raise OSError, SyntaxError, ...
        raise UserError(f"{' '.join(str(error).split())[:200] or type(error).__name__}") from error
