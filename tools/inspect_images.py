#!/usr/bin/env python
"""Inspect images and captions before they are encoded.

    python tools/inspect_images.py images/ --size 512

Names the images that cannot be read, have no caption, a caption that the text encoder cuts, fewer pixels than --size,
or the same pixels as another one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.run import run
from ldm.files import atomic_write
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of images, with captions as in tools/preencode.py")
    add("--size", type=int, help="side in pixels of the crop; smaller images are named (default: no check)")
    add("--json", type=Path, metavar="FILE", help="write the problems as JSON too")
    options = parser.parse_args()
    check_number("--size", options.size, least=1, optional=True)
    return options


def main() -> None:
    options = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.images.find import from_folder
    from ldm.inspection.image_folder import find_problems, summarise_problems

    items = [item for folder in options.folders for item in from_folder(folder, None)]
    if not items:
        raise UserError(f"{', '.join(map(str, options.folders))}: no images")
    problems = find_problems(items, options.size)
    for problem in problems:
        logger.info("%s: %s: %s", problem.kind, problem.name, problem.text)
    logger.info("%s", summarise_problems(problems, len(items)))
    if options.json is not None:
        content = {"images": len(items), "problems": [problem._asdict() for problem in problems]}
        with atomic_write(options.json) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
