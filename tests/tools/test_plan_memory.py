"""Tests of the command `tools/plan_memory.py`."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections.abc import Callable
from functools import partial

import pytest

from ldm.planning.card import GIB, needed_bytes
from ldm.release.families import FAMILIES
from ldm.util import UserError
from tests.conftest import ROOT
from tests.sparse_files import write_sparse
from tests.step_of_peak import SimulationOfPeaks, StepOfPeak

CATEGORIES = ["weights", "gradients", "optimizer", "activations", "temporaries"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[str], str]:
    """Return a function that runs the tool in this process: 10 GiB per step, 1 if streamed, plus 1 GiB per image.

    Streamed weights take 15 GiB of host memory, or 3 if the optimizer steps in backward.
    """

    def peak_of_step(config, images, size=None):
        params = config.model.params
        streamed = params.unet_config.target.endswith("StreamedUNetModel")
        low = params.get("optimizer_config", {}).get("target") == "ldm.optim.InBackward"
        weights, host = (1 if streamed else 10) * GIB, (3 if low else 15) * GIB if streamed else 0
        return dict.fromkeys(CATEGORIES, 0) | {"weights": weights, "activations": images * GIB, "host": host}

    monkeypatch.setattr("ldm.planning.step.peak_of_step", peak_of_step)
    step = partial(SimulationOfPeaks, lambda *of: StepOfPeak(peak_of_step(*of)))
    monkeypatch.setattr("ldm.planning.card.Simulation", step)
    caplog.set_level(logging.INFO)

    def call(line: str) -> str:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["plan_memory.py", *line.split()])
        runpy.run_path(str(ROOT / "tools/plan_memory.py"))["main"]()
        return "\n".join(record.getMessage() for record in caplog.records)

    return call


def test_a_real_step_as_json(fresh_command) -> None:
    done = fresh_command(
        "tools/plan_memory.py", "--json", "--base", "demo_tiny.yaml", "lightning.trainer.precision=bf16"
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert list(sizes) == [*CATEGORIES, "host", "peak", "card"]
    assert sizes["host"] > 1 << 20  # the first stage
    assert sum(sizes[name] for name in CATEGORIES) == sizes["peak"] and sizes["card"] == needed_bytes(sizes["peak"])


def test_a_step_by_category(plan) -> None:
    lines = [line.split() for line in plan("--base demo_tiny.yaml --batch 2").splitlines()]
    assert [words[:3] for words in lines[1:7]] == [
        ["weights", "10.00", "GiB"],
        ["gradients", "0.00", "GiB"],
        ["optimizer", "0.00", "GiB"],
        ["activations", "2.00", "GiB"],
        ["temporaries", "0.00", "GiB"],
        ["peak", "12.00", "GiB"],
    ]
    assert " ".join(lines[7]) == "card 12.96 GiB, including 0.6 GiB for the CUDA context, and 3 % for fragmentation"
    assert " ".join(lines[8]) == "host 1.50 GiB of host memory, including 1.5 GiB for Python and the libraries"
    streamed = plan("--base demo_tiny.yaml minimal.yaml --batch 1").splitlines()
    assert streamed[6].split() == ["peak", "2.00", "GiB"] and streamed[8].split()[:2] == ["host", "16.50"]


def test_a_release_tells_the_config(plan, tmp_path) -> None:
    write_sparse(tmp_path / "x.safetensors", FAMILIES["instruct_pix2pix"].shapes)
    said = plan(f"--ckpt {tmp_path}/x.safetensors --batch 2")
    assert "x.safetensors: InstructPix2Pix (512 pixels, predicts the noise)" in said and "12.00 GiB" in said
    said = plan(f"--ckpt {tmp_path}/x.safetensors --card 8")
    assert "use minimal.yaml: --base finetune_instruct_pix2pix.yaml minimal.yaml" in said
    assert "1.00 GiB" in plan(f"--ckpt {tmp_path}/x.safetensors --base minimal.yaml --batch 1")


@pytest.mark.parametrize(
    ("line", "config"), [("", "v2_768_v"), ("--size 512", "v2_base"), ("--size 768 --parameterization eps", "v2_base")]
)
def test_a_release_of_SD_2_goes_by_parameterization_and_size(plan, tmp_path, line: str, config: str) -> None:
    write_sparse(tmp_path / "x.safetensors", FAMILIES["sd2_base"].shapes)
    said = plan(f"--ckpt {tmp_path}/x.safetensors --card 8 {line}")
    assert f"--base finetune_stable_diffusion_{config}.yaml minimal.yaml" in said


def test_what_fits_a_card(plan) -> None:
    printed = plan("--base demo_tiny.yaml minimal.yaml --card 8")  # also predicts without the tier
    assert "as given       not even batch 1" in printed
    assert "minimal.yaml   batch 6" in printed and "7.00 GiB of tensors,  16.5 GiB of host memory" in printed
    assert "use minimal.yaml: --base demo_tiny.yaml minimal.yaml" in printed
    assert "nothing fits" in plan("--base demo_tiny.yaml --card 2")
    answer = json.loads(plan("--base demo_tiny.yaml --card 12 --json"))
    first = answer["tiers"][0]
    assert sum(first.pop("parts").values()) == 11 * GIB
    assert answer["use"] == "as given" and first == {"tier": "as given", "images": 1, "peak": 11 * GIB, "host": 0}


@pytest.mark.parametrize(("ram", "last"), [(17, "use minimal.yaml:"), (16, "use smallest.yaml:"), (4, "nothing fits;")])
def test_a_tier_that_needs_more_host_memory_is_not_recommended(plan, ram: int, last: str) -> None:
    assert plan(f"--base demo_tiny.yaml --card 4 --ram {ram}").splitlines()[-1].startswith(last)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--base nothing.yaml", "config 'nothing.yaml' not found"),
        ("--batch 1", "name the configs of a training with --base, or a release with --ckpt"),
        ("--base demo_tiny.yaml --card 0", "--card 0.0: give a number of GB above 0"),
        ("--base demo_tiny.yaml --card 8 --ram -1", "--ram -1.0: give a number of GB above 0"),
        ("--base demo_tiny.yaml --parameterization v", "--parameterization v: tells what --ckpt predicts"),
        ("--base demo_tiny.yaml --ram 16", "--ram limits the tiers for a card; give --card too"),
        ("--base demo_tiny.yaml --card 8 --batch 1", "--card computes the batch size; leave out --batch"),
    ],
)
def test_bad_input_is_refused(plan, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(line)
