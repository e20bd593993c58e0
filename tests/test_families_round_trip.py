"""Hack and merge of each family, of some after a training, at the released layout and a small width."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_checkpoint, load_state_dict
from ldm.checkpoint.formats import as_bytes
from ldm.checkpoint.keys import UNET
from ldm.release.families import FAMILIES
from ldm.release.load import load_release
from tests.conftest import ROOT
from tests.narrow_models import write_configs, write_release
from tests.tiny_training import ENCODED, write_images
from tests.training_runs import fixture_one_thread, run_main, the_run  # noqa: F401

PREENCODE, HACK, MERGE = (ROOT / "tools" / f"{name}.py" for name in ("preencode", "hack_weights", "merge_release"))
QUIET = (
    "-t --no-test --max_steps 2 --accelerator cpu --enable_progress_bar False --scale_lr False "
    "model.base_learning_rate=1e-3 data.params.batch_size=2 data.params.num_workers=0 "
    "lightning.callbacks.image_logger.params.disabled=True"
)
SIDE = 64
# One of each UNet and prediction, with and without masks. tests/test_family_runs.py trains all families, at few layers.
TRAINED = ("sd1", "sd2_768_v", "sdxl_inpainting")


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(as_bytes(one), as_bytes(other))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a working folder that is removed after the test: the checkpoints take some hundred megabytes."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("key", ENCODED)
def test_round_trip(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch, run_tool: Callable, one_thread: None
) -> None:
    family = FAMILIES[key]
    config, finetune = write_configs(family, folder)
    write_release(config, folder / "release.safetensors")
    start = load_state_dict("release.safetensors")

    hack = ("--release", "release.safetensors", "--base", finetune, "--out", "hacked.ckpt")
    assert run_tool(HACK, *hack) is None
    hacked = load_checkpoint("hacked.ckpt")
    assert hacked["parameterization"] == family.parameterization
    assert all(identical(value, start[name]) for name, value in hacked["state_dict"].items() if name in start)

    merge = ("--release", "release.safetensors", "--out")
    assert run_tool(MERGE, "--train-ckpt", "hacked.ckpt", *merge, "untrained.safetensors") is None
    check_untouched(start, load_state_dict("untrained.safetensors"), moved=set())

    if key not in TRAINED:
        return
    write_images(folder / "images", key)
    encode = ("--ckpt", "release.safetensors", "--config", config, "--images", "images", "--size", SIDE)
    assert run_tool(PREENCODE, *encode, "--out", "shards/%06d.tar", "--num-workers", 0) is None
    assert json.loads((folder / "shards/index.json").read_text())["family"] == key
    run_main(monkeypatch, f"--resume hacked.ckpt --base {finetune} data.params.training_urls=shards/*.tar {QUIET}")
    last = the_run(folder / "logs") / "checkpoints" / "last.ckpt"
    assert run_tool(MERGE, *merge, "merged.safetensors") is None
    trained, merged = load_state_dict(last), load_state_dict("merged.safetensors")
    assert all(identical(merged[name], trained[name]) for name in merged if name.startswith(UNET))
    check_untouched(start, merged, moved={name for name in start if name.startswith(UNET)})
    assert load_release("merged.safetensors", config).parameterization == family.parameterization


def check_untouched(start: dict, merged: dict, moved: set[str]) -> None:
    """Assert that a file has the release's keys in order, and all values except those `moved` bit for bit."""
    assert merged.keys() == start.keys()
    changed = {name for name in start if not identical(merged[name], start[name])}
    assert changed <= moved
    assert len(changed) >= 0.9 * len(moved)  # weights whose gradient is zero stay
