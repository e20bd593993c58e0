"""Tests of the smallest tier through main.py: the arithmetic of the lean tier, and little host memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.config.load import load_config
from ldm.planning.ledger import HOST
from ldm.planning.step import on_device, peak_of_step
from ldm.util import UserError
from tests.conftest import ROOT
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    run_main,
    state,
    the_run,
    write_inputs,
)

GIB = 2**30
WHERE = "model.params.optimizer_config"
KEYED = f"{WHERE}.params.optimizer.params.keyed_rounding=true"
WEIGHT = "model.diffusion_model.out.2.weight"
SHADOW = "model_ema.diffusion_modelout2weight"
NARROW = "model.params.unet_config.params.model_channels=128"  # 138 million parameters


@pytest.fixture(name="trained")
def fixture_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Callable[..., Path]:
    """Return a function that trains the tiny model with a tier, or resumes a run; it returns the run's folder."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(logs: str, tier: str, options: str, resume: Path | None = None) -> Path:
        start = f"-b tiny.yaml {tier} -l {logs}" if resume is None else f"--resume {resume}"
        run_main(monkeypatch, f"{start} -t --no-test {options}")
        return the_run(tmp_path / logs)

    return call


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("options", ["", f"--accumulate_grad_batches 2 {WHERE}.params.clip_each=0.5"])
def test_training_and_resuming_are_those_of_resident_weights(trained: Callable, options: str) -> None:
    """Losses of each step, weights, averages and optimizer state: bit for bit, rounding included."""
    straight = trained("lean", "lean.yaml", f"--max_steps 4 {options} {KEYED}")
    trained("smallest", "smallest.yaml", f"--max_steps 2 {options}")
    resumed = trained("smallest", "", "--max_steps 4", resume=the_run(Path("smallest")))
    assert_same_training(straight, resumed)
    weights = state(last(resumed))["state_dict"]
    assert weights[WEIGHT].dtype == torch.bfloat16 and weights[SHADOW].dtype == torch.float32


def test_its_checkpoints_resume_in_every_tier_and_back(trained: Callable, tmp_path: Path) -> None:
    """Weights of bfloat16 and moments of 8 bits become float32, and the reverse. Steps and moments go on."""
    checkpoint = None
    tiers = ("", "smallest.yaml", "minimal.yaml", "smallest.yaml", "lean.yaml", "smallest.yaml")
    for steps, tier in enumerate(tiers, 1):
        taken = "" if checkpoint is None else f"--resume {checkpoint}"
        run = trained(f"logs-{steps}", tier, f"{taken} --max_steps {steps} data.params.batch_size=2")
        checkpoint = tmp_path / f"{steps}.ckpt"
        last(run).rename(checkpoint)
        content = state(checkpoint)
        is_low = tier in ("lean.yaml", "smallest.yaml")
        assert content["state_dict"][WEIGHT].dtype == (torch.bfloat16 if is_low else torch.float32)
        moments = content["optimizer_states"][0]["state"]
        assert {kept["step"].item() for kept in moments.values()} == {steps} == {content["global_step"]}
        assert any(isinstance(kept["exp_avg"], dict) for kept in moments.values()) == is_low
        assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_the_weights_of_a_float32_checkpoint_are_rounded_once(trained: Callable, tmp_path: Path) -> None:
    plain = state(last(trained("plain", "", "--max_steps 1")))
    torch.save(plain, tmp_path / "plain.ckpt")
    frozen = f"{WHERE}.params.optimizer.params.lr=0.0"
    run = trained("smallest", "smallest.yaml", f"--resume plain.ckpt --max_steps 2 {frozen}")
    weights = state(last(run))["state_dict"]
    for key in (key for key in weights if key.startswith("model.")):
        assert weights[key].equal(plain["state_dict"][key].bfloat16())
    assert weights[SHADOW].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices 2 --accelerator cpu", "need one device and no strategy"),
        ("--gradient_clip_val 1.0", "needs all gradients at once"),
        ("--precision 16-true", "precision=16-true trains float16 weights"),
        ("model.params.unet_config.params.use_checkpoint=true", "use_checkpoint: set it to false"),
    ],
)
def test_what_does_not_go_with_it_is_refused(trained: Callable, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained("logs", "smallest.yaml", f"--max_steps 1 {options}")


STEPS = """
import json, sys
from pathlib import Path
import torch
from ldm.config.load import build_model, load_config
from ldm.planning.fake_batch import make_batch
from ldm.release.initialisation import without_initialisation
from ldm.host_memory import keep_freed_memory

def memory(key):  # MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

def train(config, steps):
    with without_initialisation():  # a checkpoint gives the weights
        model = build_model(config)
    model.to(torch.bfloat16).train()
    for parameter in model.parameters():
        parameter.detach().fill_(0.01)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model.learning_rate = 1e-4
    optimizer = model.configure_optimizers()
    batch = {key: torch.zeros_like(value) for key, value in make_batch(model, config, 1, int(sys.argv[1])).items()}

    def closure():
        loss, _ = model.shared_step(batch)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)

torch.set_num_threads(1)
keep_freed_memory()
train(load_config(["demo_tiny.yaml", "smallest.yaml"], ["data.params.batch_size=1"]), 1)  # loads all libraries
before = memory("VmRSS")
train(load_config(sys.argv[2:4], sys.argv[4:]), 2)
print(json.dumps({"grown": memory("VmHWM") - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_host_memory_is_what_the_plan_predicts() -> None:
    """On a CPU, where the device's memory is the process's too. The band is 10 % and 60 MiB around the prediction."""
    names = ["finetune_stable_diffusion.yaml", "smallest.yaml"]
    line = [sys.executable, "-c", STEPS, "64", *names, NARROW]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    grown = json.loads(done.stdout.splitlines()[-1])["grown"]
    config = load_config(names, [NARROW])
    peak = peak_of_step(config, 1, 64)
    predicted = peak[HOST] / 2**20
    assert 0.9 * predicted - 60 < grown < 1.1 * (peak[HOST] + on_device(peak)) / 2**20 + 60
    float32 = peak_of_step(load_config([names[0], "minimal.yaml"], [NARROW]), 1, 64)[HOST] / 2**20
    assert float32 > 3 * grown
