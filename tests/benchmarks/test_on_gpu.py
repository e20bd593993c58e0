"""Test of the commands of benchmarks/on_gpu.sh. None of them runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.loop import parse_arguments
from ldm.config.load import load_config
from tests.conftest import ROOT

TIERS = ("lean.yaml", "minimal.yaml", "smallest.yaml")


def test_on_gpu_measures_each_small_tier_of_sdxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia-smi", "python"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "STAGES": "sdxl"}
    script = ["bash", ROOT / "benchmarks/on_gpu.sh"]
    said = subprocess.run(script, env=os.environ | settings, capture_output=True, text=True, check=True).stdout
    commands = [line.split()[2:] for line in said.splitlines() if "benchmarks/loop.py" in line]
    assert len(commands) == len(TIERS)
    for (program, *arguments), tier in zip(commands, TIERS, strict=True):
        monkeypatch.setattr("sys.argv", [program, *arguments])
        options = parse_arguments()
        load_config([options.config, options.tier])
        found = options.config, options.tier, options.size, options.batch
        assert found == ("finetune_stable_diffusion_xl.yaml", tier, 1024, 1)
