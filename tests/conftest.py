"""What many tests share: the repository, and a tiny release of the demo's model."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RELEASE_CONFIG = "demo_tiny_release.yaml"


@pytest.fixture(autouse=True)
def no_run_folder_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run tells its folder to the processes that it starts, by the environment, which outlives it among tests."""
    monkeypatch.delenv("LDM_RUN_FOLDER", raising=False)


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release checkpoint of the demo's tiny model, with seeded weights."""
    from ldm.checkpoint import save_state_dict
    from ldm.config.load import build_model, load_config
    from tests.golden_data import fill_seeded

    path = tmp_path_factory.mktemp("tiny_release") / "release.safetensors"
    save_state_dict(fill_seeded(build_model(load_config([RELEASE_CONFIG]))).state_dict(), path)
    return path


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command line of this repository in a folder of the test's own."""

    def call(script: str, *arguments: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess:
        line: Sequence[str] = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, cwd=cwd)

    return call


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | int | None]:
    """Runs a tool of this repository in this process; returns what it exits with: None or the error."""

    def call(tool: Path, *arguments: object) -> str | int | None:
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        try:
            runpy.run_path(str(tool), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return None

    return call
