"""Image files for the datasets of public configs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def gradient(height: int, width: int) -> np.ndarray:
    """Return a smooth uint8 image (height, width, 3) whose places and channels all differ."""
    rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    return np.stack([rows + 0 * columns, columns + 0 * rows, (rows + columns) / 2], -1).astype(np.uint8)


def write_images(folder: Path, names: Iterable[str], height: int = 40, width: int = 60) -> list[Path]:
    """PNG or JPEG files `names` below `folder`, each of the gradient."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gradient(height, width)).save(path)
    return paths
