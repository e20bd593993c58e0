"""Tests that imports, declared requirements and pins agree, and that torchvision is not among them."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml

import ldm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it on 3.10, so it is there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = [
    line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
]

# Modules whose distribution goes by another name, and the modules of this checkout.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "clip": "openai-clip",
    "lightning_fabric": "pytorch-lightning",
    "taming": "taming-transformers-rom1504",
    "tomli": "pytest",
    "yaml": "pyyaml",
}
OURS = {"benchmarks", "ldm", "main", "tools", "tests"}
OURS |= {path.stem for pattern in ("benchmarks/*.py", "tests/**/*.py") for path in ROOT.glob(pattern)}


def name_of(requirement: str) -> str:
    """Return the name of a requirement: `Some_Package[extra]>=1` -> `some-package`."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def imported(*paths: str) -> set[str]:
    """Return the distributions that the Python files under `paths` import, at any depth."""
    files = [file for path in paths for file in ROOT.glob(path)]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    foreign = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - OURS
    return {name_of(DISTRIBUTIONS.get(module, module)) for module in foreign}


def names(requirements: list[str]) -> set[str]:
    return {name_of(requirement) for requirement in requirements}


def test_the_library_and_the_tools_import_only_what_is_declared():
    assert imported("main.py", "ldm/**/*.py", "tools/*.py", "data/*.py") <= names(
        RUNTIME + EXTRAS["augment"] + EXTRAS["lean"] + EXTRAS["studio"] + EXTRAS["vq"] + EXTRAS["wandb"]
    )


def test_nothing_is_installed_for_users_that_only_tests_import():
    unused = names(RUNTIME) - imported("main.py", "ldm/**/*.py", "tools/*.py")
    assert unused <= {"openai-clip", "tensorboard"}  # whose vocabulary is read, and what Lightning logs with


def test_tests_and_benchmarks_import_only_what_is_declared():
    assert imported("tests/**/*.py", "benchmarks/*.py") <= names(
        RUNTIME + EXTRAS["lean"] + EXTRAS["optimizers"] + EXTRAS["studio"] + EXTRAS["vq"] + EXTRAS["test"]
    )


def test_every_requirement_is_pinned_within_its_range():
    wanted = RUNTIME + [
        part for extra in ("lean", "vq", "test", "augment", "docs", "studio", "dev") for part in EXTRAS[extra]
    ]
    assert names(wanted) - names(PINS) == {PROJECT["name"]}
    exact = {line for line in wanted if "==" in line}
    assert exact <= set(PINS)


@pytest.mark.parametrize("older", [False, True], ids=["3.11 and newer", "3.10"])
def test_one_pin_per_package_and_python_version(older):
    unwanted = 'python_version >= "3.11"' if older else 'python_version < "3.11"'
    pinned = [name_of(line) for line in PINS if unwanted not in line]
    assert len(pinned) == len(set(pinned))


def test_torchvision_and_cuda_are_nowhere():
    assert not names(RUNTIME + PINS) & {"torchvision", "triton"}
    assert not [line for line in PINS if line.startswith("nvidia")]


def test_conda_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    python, _, pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert python == "python=3.11"
    assert pip["pip"] == ["-c constraints.txt", "-e .[dev]"]


def test_the_version_is_the_package_s():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ldm.__version__)
    assert PROJECT["dynamic"] == ["version"]
