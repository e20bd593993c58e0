"""Who may import whom, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each room may import from its own row and from the rows below it.
ROOMS = (
    ("main", "tools"),
    ("ldm.callbacks", "ldm.data", "ldm.evaluation", "ldm.models", "ldm.planning", "ldm.training"),
    ("ldm.modules", "ldm.optim"),
    (
        "ldm.util",
        "ldm.files",
        "ldm.shards.sample",
        "ldm.cli",
        "ldm.checkpoint",
        "ldm.host_copy",
        "ldm.lr_scheduler",
        "ldm.images.grid",
        "ldm.translations",
    ),
)
FORBIDDEN = {
    "ldm.modules": ("pytorch_lightning", "omegaconf", "webdataset"),
    "ldm.optim": ("ldm.modules", "pytorch_lightning", "lightning_fabric", "omegaconf", "webdataset"),
    "ldm.data": ("ldm.models", "ldm.evaluation", "ldm.planning", "ldm.training", "ldm.callbacks"),
    "ldm.models": (
        *("ldm.data", "ldm.evaluation", "ldm.planning", "ldm.training", "ldm.callbacks"),
        *("omegaconf", "webdataset"),
    ),
    "ldm.evaluation": ("ldm.training", "ldm.callbacks", "pytorch_lightning", "omegaconf", "webdataset"),
}
SOURCES = sorted([*ROOT.glob("ldm/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "main.py"])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def row(name: str) -> int | None:
    return next((index for index, rooms in enumerate(ROOMS) if any(within(name, room) for room in rooms)), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    if name == "ldm":
        assert not list(imports(path))
        return
    assert row(name) is not None, f"{name} is in no room"
    for imported in imports(path):
        below = row(imported)
        assert below is None or below >= row(name), f"{name} imports {imported}"
        assert not within(imported, "tools"), f"{name} imports {imported}"
        assert not within(imported, "main"), f"{name} imports {imported}"
        assert not within(imported, "torchvision"), f"{name} imports {imported}"
        for room, forbidden in FORBIDDEN.items():
            if within(name, room):
                assert not any(within(imported, other) for other in forbidden), f"{name} imports {imported}"


COMMANDS = [ROOT / "main.py", ROOT / "data/train_base.py", *ROOT.glob("tools/*.py")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help_needs_no_torch(path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
