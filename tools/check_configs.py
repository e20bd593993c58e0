#!/usr/bin/env python
"""Check which configs of other projects work here: print a table of models that build, data that resolve, and problems.

python tools/check_configs.py their_configs/ v1-finetune.yaml
python tools/check_configs.py their_configs/ --out table.md

The tool builds models on the meta device, without weights and without their checkpoint paths. Data resolve if every
class exists and takes its arguments; no dataset is opened. The tool downloads nothing. It imports only classes of this
project, torch and Lightning.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.run import HelpFormatter, run
from ldm.files import atomic_write

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files, or folders with YAML files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to a file instead of printing it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.training.survey import check_config, find_configs, format_table

    table = format_table([check_config(path) for path in find_configs(arguments.configs)])
    if arguments.out is None:
        logger.info(table.rstrip())
        return
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(table, encoding="utf-8")
    logger.info("wrote %s", arguments.out)


if __name__ == "__main__":
    run(main)
