#!/usr/bin/env python
"""Which configs, written by whoever, work here: a table of what builds, what resolves and what is missing.

python tools/check_configs.py their_configs/ v1-finetune.yaml
python tools/check_configs.py their_configs/ --out table.md

A model is built without weights and without memory for them; checkpoint paths are left out. Data resolve where every
class exists and takes its arguments; no dataset is opened. Nothing is downloaded, and nothing that a config names
outside of this project, torch and Lightning is imported.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from whichever folder this is run

from ldm.cli.run import HelpFormatter, run
from ldm.files import atomic_write

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files, or folders of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there instead of printing it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Only now the slow imports: --help should answer at once.
    from ldm.training.survey import check_config, find_configs, table

    made = table([check_config(path) for path in find_configs(arguments.configs)])
    if arguments.out is None:
        logger.info(made.rstrip())
        return
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(made, encoding="utf-8")
    logger.info("%s: written", arguments.out)


if __name__ == "__main__":
    run(main)
