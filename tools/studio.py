#!/usr/bin/env python
"""Serve the recipe as a page for the browser: images and captions, plan, training, comparison, release.

    python tools/studio.py
    python tools/studio.py --folder /data/photos --port 8000
    python tools/studio.py --demo

Every action shows the command that it runs. What it starts goes on when the page or the studio is closed. Only the
folders of --folder can be read, and the working directory. Served to other machines than this, the page asks for
the password in the environment variable LDM_STUDIO_PASSWORD.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.run import HelpFormatter, run
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, nargs="+", action="extend", default=[], metavar="DIR", help="folders that the page may "
        "read, besides the working directory")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen at; another than this machine's needs a password")
    add("--port", type=int, default=7860, help="port to listen at; 0 for any")
    add("--work", type=Path, default=Path("outputs/studio"), help="folder for jobs, shards and start checkpoints")
    add("--demo", action="store_true", help="fill the fields with the values of the demo")
    options = parser.parse_args()
    check_number("--port", options.port, least=0, most=65535)
    if find_spec("gradio") is None:
        raise UserError("gradio is not installed; install it with: pip install -c constraints.txt -e '.[studio]'")
    return options


def main() -> None:
    options = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.studio.start import start_studio

    start_studio(options.folder, options.host, options.port, options.work, options.demo, os.environ, logger.info)


if __name__ == "__main__":
    run(main)
