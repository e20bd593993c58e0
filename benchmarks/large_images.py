#!/usr/bin/env python
"""Memory and time of reading one image of the most pixels that are read, 13,370 x 13,370, for each kind of file.

    python benchmarks/large_images.py --folder /tmp/large

Each image is of one colour, so its file is small. It is read as pre-encoding reads it, and fitted to 512 x 512, in a
process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from ldm.images.find import ImageItem
from ldm.images.transforms import fit_square

SIDE = 13_370
KINDS = {
    "rgb.png": ("RGB", {}),
    "rgba.png": ("RGBA", {}),
    "grey-alpha.png": ("LA", {}),
    "palette.png": ("P", {}),
    "palette-transparent.png": ("P", {"transparency": 0}),
    "grey-16-bits.png": ("I;16", {}),
    "rgb.jpg": ("RGB", {}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "cmyk.jpg": ("CMYK", {}),
    "rgb.tif": ("RGB", {"compression": "tiff_lzw"}),
    "rgb.bmp": ("RGB", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the images, 0.6 GB")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| file | bytes | peak memory of the read | seconds |\n|---|---|---|---|")
    for name in options.kinds:
        path = options.folder / name
        for work in (write, read):
            process = multiprocessing.get_context("fork").Process(target=work, args=(path,))
            process.start()
            process.join()


def write(path: Path) -> None:
    mode, options = KINDS[path.name]
    if not path.exists():
        Image.new(mode, (SIDE, SIDE)).save(path, **options)


def read(path: Path) -> None:
    """Read the image at `path`, and print a line of the table."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = memory("VmRSS"), time.monotonic()
    ImageItem(path.name, path).read(lambda pixels: fit_square(torch.from_numpy(pixels), 512))
    seconds, peak = time.monotonic() - began, memory("VmHWM") - before
    print(f"| {path.name} | {path.stat().st_size / 1e6:.2f} MB | {peak / 1e9:.2f} GB | {seconds:.0f} |", flush=True)


def memory(entry: str) -> int:
    """Return an entry of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


if __name__ == "__main__":
    main()
