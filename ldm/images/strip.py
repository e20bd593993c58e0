"""Strip of logged images over time: a row per prompt, a column per step."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from ldm.images.grid import save_png
from ldm.images.logged_names import parse_logged_name, spread_evenly
from ldm.images.logged_png import read_logged_png
from ldm.util import UserError

_SIDE = 256  # pixels of a column, and maximum height of a row
_COLUMNS = 16  # maximum number of steps
_GAP, _TITLE = 2, 14  # pixels around images, and for the step above a column


def write_strip(folder: Path, path: Path) -> None:
    """Write the images in `folder` with names of `logged_name` as one image to `path`.

    The steps of a long run are thinned evenly; the first and the last remain. A place without a readable image stays
    black.
    """
    found: dict[tuple[str, int], Path] = {}
    for file in sorted(folder.glob("*.png")):
        name = parse_logged_name(file.name)
        if name is not None:
            found[name] = file
    if not found:
        return
    steps = spread_evenly(sorted({step for _, step in found}), _COLUMNS)
    cells = {place: cell for place, file in found.items() if place[1] in steps and (cell := _reduced(file))}
    if not cells:
        return
    rows = sorted({key for key, _ in cells})
    heights = [max(cell.height for (key, _), cell in cells.items() if key == row) for row in rows]
    width = max(cell.width for cell in cells.values())
    size = _GAP + len(steps) * (width + _GAP), _TITLE + sum(height + _GAP for height in heights)
    strip = Image.new("RGB", size)
    pen = ImageDraw.Draw(strip)
    for column, step in enumerate(steps):
        left, top = _GAP + column * (width + _GAP), _TITLE
        pen.text((left, 1), str(step), fill="white")
        for row, height in zip(rows, heights, strict=True):
            if (row, step) in cells:
                strip.paste(cells[row, step], (left, top))
            top += height + _GAP
    save_png(strip, path)


def _reduced(path: Path) -> Image.Image | None:
    try:
        reduced = read_logged_png(path)
    except UserError:  # an unreadable image must not end a training
        return None
    reduced.thumbnail((_SIDE, _SIDE))
    return reduced
