"""Checks of training and sampling on a fake GPU. `python -m tests.device.checks` runs them all.

Prints a line of JSON for each check: its name, and what went wrong or null. `tests/device/test_device.py` reads them.
"""

from __future__ import annotations

import json
import traceback

from tests.device import beside_training, pretended, training  # noqa: F401 - they name their checks
from tests.device.steps import CHECKS


def main() -> None:
    pretended.install()
    for name, function in CHECKS.items():
        try:
            function()
            problem = None
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps({"check": name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main()
