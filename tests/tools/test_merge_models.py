"""Tests of the command `tools/merge_models.py`. The mixtures are tested in tests/ldm/release/test_mixture.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_state_dict, save_state_dict
from tests.conftest import ROOT
from tests.release_layouts import flat_clip, linear_attention
from tests.sparse_files import write_sparse
from tests.tiny_families import write_tiny

TOOL = ROOT / "tools/merge_models.py"
KEY, MIDDLE = "model.diffusion_model.out.2.weight", "model.diffusion_model.middle_block.0.weight"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with the releases a, b and c, whose weights are 1, 2 and 4."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        save_state_dict({KEY: torch.full((2,), value), MIDDLE: torch.full((2,), value)}, f"{name}.ckpt")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("a.ckpt", "b.ckpt"), [1.5, 1.5]),
        (("a.ckpt", "b.ckpt", "c.ckpt", "--alpha", 0.25, 0.5), [2.75, 2.75]),
        (("a.ckpt", "c.ckpt", "b.ckpt", "--method", "add-difference", "--alpha", 1), [3, 3]),
        (("a.ckpt", "c.ckpt", "--method", "slerp", "--alpha", 1), [4, 4]),
        (("a.ckpt", "b.ckpt", "--alpha", 0, "--block", "middle_block=1"), [1, 2]),
    ],
)
def test_merge_models(work: Path, run_tool: Callable, arguments: tuple, expected: list[float]) -> None:
    assert run_tool(TOOL, *arguments, "--out", "m.safetensors") is None
    found = load_state_dict("m.safetensors")
    assert [found[KEY][0].item(), found[MIDDLE][0].item()] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.ckpt",), "--method sum: takes 2 files or more"),
        (("a.ckpt", "b.ckpt", "--method", "add-difference"), "--method add-difference: takes 3 files"),
        (("a.ckpt", "b.ckpt", "c.ckpt"), "--alpha: has 1 numbers; these files and this method take 2"),
        (("a.ckpt", "b.ckpt", "--alpha", "nan"), "--alpha nan: give a finite number"),
        (("a.ckpt", "b.ckpt", "--block", "middle_block"), "--block middle_block: write NAME=ALPHA"),
        (("a.ckpt", "b.ckpt", "--block", "x=1"), "--block x: no weight begins with it"),
        (("a.ckpt", "none.ckpt"), "none.ckpt: no such file"),
    ],
)
def test_merge_models_refuses(work: Path, run_tool: Callable, arguments: tuple, message: str) -> None:
    error = run_tool(TOOL, *arguments, "--out", "m.ckpt")
    assert error.startswith(f"error: {message}") and "\n" not in error
    assert not (work / "m.ckpt").exists()


def test_merge_models_reads_one_weight_at_a_time(tmp_path: Path) -> None:
    """Three releases of 192 MB each take less memory than one."""
    shapes = {f"model.diffusion_model.input_blocks.{number}.weight": (1024, 4096) for number in range(24)}
    for name in "abc":
        write_sparse(tmp_path / f"{name}.safetensors", shapes)
    code = (
        "import resource, runpy, sys, torch\n"
        "import ldm.release.mixture\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"sys.argv = [{str(TOOL)!r}, 'a.safetensors', 'b.safetensors', 'c.safetensors',\n"
        "    '--method', 'add-difference', '--out', 'm.safetensors']\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('grown', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 192_000  # KiB
    (tmp_path / "m.safetensors").unlink()


@pytest.mark.parametrize("family", ["sd1", "sd2_768_v", "sdxl"])
def test_merge_models_of_a_family(tmp_path: Path, run_tool: Callable, family: str) -> None:
    path, _ = write_tiny(family, tmp_path)
    plain = load_state_dict(path)
    save_state_dict({key: value * 2 for key, value in plain.items()}, tmp_path / "other.ckpt")
    assert run_tool(TOOL, path, tmp_path / "other.ckpt", "--out", tmp_path / "m.ckpt") is None
    mixed = load_state_dict(tmp_path / "m.ckpt")
    assert mixed.keys() == plain.keys()
    torch.testing.assert_close(mixed[KEY], 1.5 * plain[KEY])


def test_merge_models_matches_layouts_and_keeps_the_names_of_the_first(tmp_path: Path, run_tool: Callable) -> None:
    path, _ = write_tiny("sd1", tmp_path)
    plain = load_state_dict(path)
    foreign = linear_attention(flat_clip(plain))
    save_state_dict(foreign, tmp_path / "foreign.safetensors")
    save_state_dict({key: value + 1 for key, value in plain.items()}, tmp_path / "other.ckpt")
    assert (
        run_tool(TOOL, tmp_path / "foreign.safetensors", tmp_path / "other.ckpt", "--out", tmp_path / "m.ckpt") is None
    )
    mixed = load_state_dict(tmp_path / "m.ckpt")
    assert {key: value.shape for key, value in mixed.items()} == {key: value.shape for key, value in foreign.items()}
    changed = [key for key in mixed if not torch.equal(mixed[key], foreign[key])]
    assert any("to_q" in key for key in changed) and any(key.startswith("cond_stage_model.") for key in changed)
