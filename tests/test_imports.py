"""Tests of the import directions between rooms, and of commands that start without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The rooms from the top down. A room imports from itself and from the rooms below it.
ROOMS = (
    "main",
    "tools",
    "ldm.studio",
    "ldm.cli",
    "ldm.reporting",
    "ldm.planning",
    "ldm.training",
    "ldm.encoding",
    "ldm.release",
    "ldm.callbacks",
    "ldm.inspection",
    "ldm.evaluation",
    "ldm.models",
    "ldm.data",
    "ldm.shards",
    "ldm.images",
    "ldm.config",
    "ldm.distributed",
    "ldm.checkpoint",
    "ldm.optim",
    "ldm.lr_scheduler",
    "ldm.modules",
    "ldm.processor",
    "ldm.host_copy",
    "ldm.host_memory",
    "ldm.events",
    "ldm.folders",
    "ldm.remote",
    "ldm.text_files",
    "ldm.files",
    "ldm.identity",
    "ldm.locks",
    "ldm.util",
    "ldm.moved_targets",
    "ldm.printable",
)
# Libraries that a room does without.
FORBIDDEN = {
    "ldm.modules": ("pytorch_lightning", "omegaconf", "webdataset"),
    "ldm.optim": ("pytorch_lightning", "lightning_fabric", "omegaconf", "webdataset"),
    "ldm.models": ("omegaconf", "webdataset"),
    "ldm.evaluation": ("pytorch_lightning", "omegaconf", "webdataset"),
    "ldm": ("torchvision",),
}
SOURCES = sorted([*ROOT.glob("ldm/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "main.py"])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that the file imports, anywhere in it, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in submodules if name in MODULES] or [node.module]


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def floor(name: str) -> int | None:
    return next((index for index, room in enumerate(ROOMS) if within(name, room)), None)


def test_a_class_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {"LatentDiffusion": ["ldm.models.diffusion.ddpm_edit"]}  # two, as in public configs
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and name not in places.get(node.name, ()):
                places.setdefault(node.name, []).append(name)
    shared = {name: found for name, found in places.items() if len(found) > 1}
    assert shared == {"LatentDiffusion": ["ldm.models.diffusion.ddpm_edit", "ldm.models.diffusion.latent"]}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    path = MODULES[name]
    if name == "ldm":
        assert not list(imports(path))
        return
    assert floor(name) is not None, f"{name} is in no room"
    for imported in imports(path):
        below = floor(imported)
        assert below is None or below >= floor(name), f"{name} imports {imported}"
        for room, forbidden in FORBIDDEN.items():
            if within(name, room):
                assert not any(within(imported, other) for other in forbidden), f"{name} imports {imported}"


def test_imports_have_no_cycle() -> None:
    graph = {name: [other for other in imports(path) if other in MODULES] for name, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


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
