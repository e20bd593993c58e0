"""Checks of training and sampling on a fake GPU. `python -m tests.device.checks NAME` runs one."""

from __future__ import annotations

import sys

from tests.device import beside_training, pretended, training  # noqa: F401 - they name their checks
from tests.device.steps import CHECKS


def run_check(name: str) -> None:
    """Run a check in this process, which keeps the fake device."""
    pretended.install()
    CHECKS[name]()


if __name__ == "__main__":
    run_check(sys.argv[1])
