"""Reading of the images that a training logged. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.files import open_file
from ldm.util import UserError

SETTINGS = "parameters"  # text entry of a PNG with the settings of its image, as JSON
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


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings in the PNG file at `path`; None if it has none, or is damaged."""
    try:
        with open_file(path) as file, Image.open(file, formats=("PNG",)) as image:
            settings = json.loads(image.info[SETTINGS])
            return settings if isinstance(settings, dict) else None
    except Exception:  # as in `read_logged_png`, and JSON's own
        return None
