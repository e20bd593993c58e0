"""Renderer of the emoji that `metadata.jsonl` lists: 64x64 RGB PNGs on white, written next to that file.

    python data/render_emoji.py data/emoji data/cats data/clocks

The font is version 2.042 of Noto Color Emoji, from the Debian package fonts-noto-color-emoji. With this font and the
Pillow version in constraints.txt, the output equals the committed files byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldm.cli.run import run
from ldm.files import atomic_write
from ldm.util import UserError

logger = logging.getLogger(__name__)

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SHA256 = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"
STRIKE = 109  # the only size of the font's bitmaps; a cell is 136 pixels wide, with the 128x128 drawing in its middle
BOX = (4, 0, 132, 128)


def draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return one emoji as a 64x64 RGB image on white. Each pixel is the mean of four pixels of the font's bitmap."""
    cell = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(cell).text((0, 0), text, font=font, embedded_color=True)
    return cell.crop(BOX).reduce(2)


def render_folder(folder: Path, font: ImageFont.FreeTypeFont) -> int:
    """Render each entry of `folder/metadata.jsonl`; return their number."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        text = "".join(chr(int(point, 16)) for point in row["codepoints"].split())
        with atomic_write(folder / row["file_name"]) as path:
            draw(text, font).save(path, optimize=True)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold a metadata.jsonl")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf (default: %(default)s)")
    args = parser.parse_args()
    if not args.font.is_file():
        raise UserError(f"{args.font}: no such font; apt-get install fonts-noto-color-emoji, or give --font a path")
    if hashlib.sha256(args.font.read_bytes()).hexdigest() != FONT_SHA256:
        logger.warning("%s is not version 2.042 of the font: the images may differ from the committed ones", args.font)
    font = ImageFont.truetype(args.font, STRIKE)
    for folder in args.folders:
        logger.info("%s: %d images", folder, render_folder(folder, font))


if __name__ == "__main__":
    run(main)
