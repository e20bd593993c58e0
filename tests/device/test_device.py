"""Tests of training and sampling on a fake GPU: devices of tensors, and no waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch.utils.backend_registration as registration

from tests.device.checks import CHECKS
from tests.device.pretended import ROOT

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch makes no such device"
)


@pytest.fixture(scope="module")
def problems() -> dict[str, str | None]:
    """Run the checks in a separate process, because a fake device cannot be removed; return the problem per check."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.device.checks"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    crash = f"the process ended with {done.returncode} before or in this check: {done.stderr[-3000:]}"
    return dict.fromkeys(CHECKS, crash) | {entry["check"]: entry["problem"] for entry in found}


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_pretended_device(name: str, problems: dict[str, str | None]) -> None:
    if problems[name] is not None:
        pytest.fail(problems[name], pytrace=False)
