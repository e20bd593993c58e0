"""Tests of the command `tools/merge_release.py`. The merge itself is tested in tests/ldm/release/test_merge.py."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.fork_server import run_script
from ldm.checkpoint import load_state_dict, save_checkpoint, save_state_dict

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "merge_release.py"
RELEASE = "models/ldm/stable-diffusion-v1/model.ckpt"
LAST = "logs/run/checkpoints/last.ckpt"
MERGED = "logs/run/checkpoints/merged.ckpt"


@pytest.fixture
def work(tmp_path):
    """Make a working folder with a release and a training checkpoint with EMA, at the default paths."""
    release = {"model.w": torch.zeros(3), "cond_stage_model.w": torch.arange(4.0), "betas": torch.ones(5)}
    training = {"model.w": torch.ones(3), "model_ema.w": torch.full((3,), 0.5), "betas": torch.ones(5)}
    save_state_dict(release, tmp_path / RELEASE)
    state = {"global_step": 3, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    save_checkpoint({"state_dict": training, **state}, tmp_path / LAST)
    return tmp_path


def merge(folder, *arguments):
    return run_script([str(TOOL), *map(str, arguments)], folder)


def run_here(monkeypatch, folder, *arguments):
    """Run the tool in this process, which saves the import of torch; return the exit code or message."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOL), run_name="__main__")
    return caught.value.code


def test_without_arguments_the_default_paths_are_used_and_printed(work):
    done = merge(work)
    assert done.returncode == 0, done.stderr
    weights = load_state_dict(work / MERGED)
    assert weights["model.w"].tolist() == [0.5] * 3
    assert weights["cond_stage_model.w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    for text in (
        RELEASE,
        LAST,
        MERGED,
        "1 weights taken from the training, moving average (ema)",
        "2 values of the release kept",
    ):
        assert text in done.stdout


def test_every_flag(work):
    shutil.move(work / RELEASE, work / "r.safetensors")
    flags = [
        "--train-ckpt",
        LAST,
        "--release",
        "r.safetensors",
        "--out",
        "m/m.safetensors",
        "--weights",
        "raw",
        "--half",
    ]
    done = merge(work, *flags)
    assert done.returncode == 0, done.stderr
    weights = load_state_dict(work / "m/m.safetensors")
    assert weights["model.w"].tolist() == [1.0] * 3
    assert weights["model.w"].dtype == torch.float16
    assert weights["betas"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--release", "none.ckpt"], "none.ckpt: no such file"),
        (["--train-ckpt", "none.ckpt"], "none.ckpt: no such file"),
        (["--train-ckpt", RELEASE], "not a training checkpoint"),
        (["--out", "merged.bin"], "must end in .ckpt or .safetensors"),
        (["--out", RELEASE], "choose another --out"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(arguments, message, work, monkeypatch):
    before = {path: path.is_file() and path.stat().st_mtime_ns for path in work.rglob("*")}
    printed = run_here(monkeypatch, work, *arguments)
    assert printed.startswith("error: ") and message in printed and "\n" not in printed
    assert {path: path.is_file() and path.stat().st_mtime_ns for path in work.rglob("*")} == before


def test_an_error_is_exit_code_1(tmp_path):
    done = merge(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "--train-ckpt" in done.stderr and done.stderr.count("\n") == 1


def test_help_imports_neither_torch_nor_lightning(help_of):
    printed, packages = help_of(TOOL)
    assert "--weights" in printed and not packages & {"torch", "pytorch_lightning", "lightning"}
