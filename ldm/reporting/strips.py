"""Logged images of a run over its steps, as data URIs of limited size. Imports no torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ldm.images.logged_names import PREVIEWS, parse_logged_name, spread_evenly
from ldm.images.logged_png import read_logged_png
from ldm.util import UserError

_SIDE, _QUALITY = 1024, 82  # longest side in pixels, and quality of the images in the page
_MOST_FRAMES = 24  # steps per strip


class Shown(NamedTuple):
    """Image in a page: its name, size in pixels and data URI."""

    name: str
    width: int
    height: int
    uri: str


class Frame(NamedTuple):
    """Images of one step."""

    step: int
    images: list[Shown]


class Strip(NamedTuple):
    """Frames of a folder of logged images, such as `train`, by increasing step."""

    name: str
    frames: list[Frame]


def read_strips(folder: Path, budget: int, problems: list[str]) -> list[Strip]:
    """Return the strips of the run in `folder` whose data URIs have at most `budget` bytes together, previews first.

    The steps of a long run are thinned evenly; the first and the last remain.
    """
    places = [place for place in (folder / PREVIEWS, *sorted(folder.glob("images/*"))) if place.is_dir()]
    strips = []
    for place in places:
        frames = list(_frames(place, folder, problems))
        while sum(len(image.uri) for frame in frames for image in frame.images) > budget / len(places):
            if len(frames) < 2:
                problems.append(f"{place.relative_to(folder)}: the images are too large for the report")
                frames = []
            frames = spread_evenly(frames, len(frames) // 2)
        if frames:
            strips.append(Strip(place.name, frames))
    return strips


def _frames(place: Path, folder: Path, problems: list[str]) -> Iterator[Frame]:
    steps: dict[int, list[tuple[str, Path]]] = {}
    for path in sorted(place.glob("*.png")):
        found = parse_logged_name(path.name)
        if found is not None:
            steps.setdefault(found.step, []).append((found.key, path))
    for step in spread_evenly(sorted(steps), _MOST_FRAMES):
        images = []
        for key, path in steps[step]:
            try:
                images.append(show_file(path, key))
            except UserError as error:
                problems.append(f"{path.relative_to(folder)}: not a readable image ({error})")
        if images:
            yield Frame(step, sorted(images, key=_rank))


def _rank(image: Shown) -> tuple[bool, str]:
    """Sort samples first."""
    return not image.name.startswith("samples"), image.name


def show_file(path: Path, name: str) -> Shown:
    """Return the PNG file at `path` for a page.

    Raises:
        UserError: the file is not a readable PNG, or too large.
    """
    return show(read_logged_png(path), name)


def show(image: Image.Image, name: str) -> Shown:
    """Return `image`, reduced to the page's size if it is larger, as a WebP data URI."""
    if max(image.size) > _SIDE:
        image = image.copy()
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=_QUALITY)
    return Shown(name, *image.size, f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")
