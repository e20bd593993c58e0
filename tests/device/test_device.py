"""Tests of training and sampling on a fake GPU: devices of tensors, and no waits for the device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration

from benchmarks.fork_server import start
from tests.device.checks import CHECKS, run_check

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"), reason="this torch makes no such device"
)


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_pretended_device(name: str, tmp_path: Path) -> None:
    """Run a check in a process of its own, because a fake device cannot be removed."""
    said = tmp_path / "said"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = start(run_check, name, folder=tmp_path, output=said, environment=environment)
    process.join()
    if process.exitcode != 0:
        pytest.fail(f"ended with {process.exitcode}: {said.read_text()[-6000:]}", pytrace=False)
