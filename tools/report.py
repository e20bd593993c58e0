#!/usr/bin/env python
"""Write a report of a run, or a comparison of several: one HTML file that opens without a network.

    python tools/report.py logs/RUN
    python tools/report.py logs/RUN logs/OTHER --out comparison.html

A run that is under way, was killed or has damaged files is reported as far as it can be read. If the shards are there
and the run's last checkpoint has the autoencoder, the report shows samples with their captions.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.run import run
from ldm.reporting import SAMPLES
from ldm.util import UserError, check_number

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="logs/RUN", help="run folder; several are compared")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: report.html in the run folder, or comparison.html beside the first of several)",
    )
    add("--samples", type=int, default=SAMPLES, help="samples of the training set with captions; 0 for none "
        "(default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    check_number("--samples", options.samples, least=0)
    if options.out is not None and options.out.suffix != ".html":
        raise UserError(f"--out {options.out}: the name must end in .html")
    repeated = next((path for number, path in enumerate(options.runs) if path in options.runs[:number]), None)
    if repeated is not None:
        raise UserError(f"{repeated}: given twice; name each run once")
    return options


def main() -> None:
    options = parse_arguments()
    # Slow imports come after parsing, so that --help answers at once.
    from ldm.reporting.report_file import report_path, write_report
    from ldm.reporting.training_sets import SampleLimits

    out = options.out or report_path(options.runs)
    write_report(options.runs, out, SampleLimits(options.samples))
    logger.info("wrote %s (%.1f MB)", out, out.stat().st_size / 1e6)


if __name__ == "__main__":
    run(main)
