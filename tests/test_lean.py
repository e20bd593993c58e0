"""Tests of the lean tier through main.py and the tools, and of its optimizer against plain AdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_state_dict, save_state_dict, weights_digest
from ldm.config.load import build_model, load_config
from ldm.release.configs import training_config
from ldm.release.hack import hack_config, hack_training
from ldm.release.merge import merge_files
from ldm.util import UserError
from tests.golden_data import fill_seeded
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    run_main,
    state,
    the_run,
    write_index,
    write_inputs,
)

WHERE = "model.params.optimizer_config"
SCHEDULE = "model.params.scheduler_config.target=ldm.lr_scheduler.LambdaLinearScheduler " + " ".join(
    f"model.params.scheduler_config.params.{setting}"
    for setting in ("warm_up_steps=[2]", "cycle_lengths=[10]", "f_start=[0.5]", "f_max=[1.0]", "f_min=[0.1]")
)
WEIGHT = "model.diffusion_model.out.2.weight"
SHADOW = "model_ema.diffusion_modelout2weight"


@pytest.fixture(name="lean")
def fixture_lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Callable[[str], None]:
    """Return a function that trains the tiny model with lean.yaml."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> None:
        base = "" if "--resume" in line else "-b tiny.yaml lean.yaml "
        run_main(monkeypatch, f"{base}-t --no-test {line}")

    return call


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("options", [SCHEDULE, f"{WHERE}.params.optimizer.target=ldm.optim.low_bit.AdamW4bit"])
def test_a_resumed_lean_run_equals_an_uninterrupted_one(lean: Callable, tmp_path: Path, options: str) -> None:
    lean(f"-l straight --max_steps 4 {options}")
    lean(f"-l resumed --max_steps 2 {options}")
    resumed = the_run(tmp_path / "resumed")
    lean(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    if options == SCHEDULE:
        rates = [float(rate) for rate in logged(resumed, "lr-InBackward").values()]
        assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.82e-3, 0.73e-3])


def test_a_lean_run_decays_to_its_start(lean: Callable, tmp_path: Path) -> None:
    """Laid over lean.yaml, the decay leaves its optimizer as it is, but for the decay to zero."""
    torch.manual_seed(23)  # as the runs do, whose weights these are
    save_state_dict(build_model(load_config([tmp_path / "tiny.yaml"])).state_dict(), tmp_path / "start.safetensors")
    where = "lightning.callbacks.decay_to_start.params"
    options = f"-b decay_to_start.yaml {where}.start=start.safetensors {where}.weight=100 {where}.every_n_steps=2"
    lean(f"-l straight --max_steps 4 {options}")
    lean(f"-l resumed --max_steps 2 {options}")
    resumed = the_run(tmp_path / "resumed")
    lean(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    content = state(last(resumed))
    assert {group["weight_decay"] for group in content["optimizer_states"][0]["param_groups"]} == {0.0}
    lean("-l free --max_steps 4")
    start = load_state_dict(tmp_path / "start.safetensors")[WEIGHT]
    free = state(last(the_run(tmp_path / "free")))["state_dict"][WEIGHT]
    pulled = content["state_dict"][WEIGHT]
    assert pulled.dtype == free.dtype == torch.bfloat16
    assert (pulled.float() - start).norm() < 0.8 * (free.float() - start).norm()


def test_only_weights_are_bfloat16(lean: Callable, tmp_path: Path) -> None:
    lean("--max_steps 1 model.params.learn_logvar=True")
    weights = state(last(the_run(tmp_path / "logs")))["state_dict"]
    halves = {key for key, value in weights.items() if value.dtype == torch.bfloat16}
    assert {key for key in weights if key.startswith("model.")} <= halves
    assert all(key.startswith(("model.", "first_stage_model.")) for key in halves)
    assert {weights[key].dtype for key in ("logvar", "betas", SHADOW)} == {torch.float32}
    assert len(weights["alphas_cumprod"].unique()) == 50


def test_lean_checkpoints_are_hacked_resumed_and_merged(lean: Callable, tmp_path: Path) -> None:
    released = fill_seeded(build_model(load_config([tmp_path / "tiny.yaml"]))).state_dict()
    released = {key: value for key, value in released.items() if not key.startswith("model_ema.")}
    save_state_dict(released, tmp_path / "release.safetensors")
    lean("-l first --max_steps 1")
    first = the_run(tmp_path / "first")
    hack_training(last(first), tmp_path / "release.safetensors", last(first))
    hacked = state(last(first))
    assert torch.equal(hacked["state_dict"][WEIGHT], released[WEIGHT].bfloat16())
    assert torch.equal(hacked["state_dict"][SHADOW], released[WEIGHT])

    lean(f"--resume {first} --max_steps 3")
    trained = state(last(first))["state_dict"]
    for kind, key in (("ema", SHADOW), ("raw", WEIGHT)):
        merge_files(last(first), tmp_path / "release.safetensors", tmp_path / f"{kind}.ckpt", kind, half=False)
        merged = load_state_dict(tmp_path / f"{kind}.ckpt")
        assert merged[WEIGHT].dtype == torch.float32
        unchanged = trained[key] == released[WEIGHT].to(trained[key].dtype)  # is the release's, to its last bit
        assert torch.equal(merged[WEIGHT], torch.where(unchanged, released[WEIGHT], trained[key].float()))
        assert not torch.equal(merged[WEIGHT], released[WEIGHT])


def test_a_lean_run_resumes_with_the_set_of_its_autoencoder(lean: Callable, tmp_path: Path) -> None:
    """The checkpoints hold the autoencoder in bfloat16, whose digest differs from the float32 one that made the set."""
    release, hacked = tmp_path / "release.safetensors", tmp_path / "hacked.ckpt"
    save_state_dict(fill_seeded(build_model(load_config([tmp_path / "tiny.yaml"]))).state_dict(), release)
    write_index(tmp_path / "shards", autoencoder=weights_digest(load_state_dict(release), "first_stage_model."))
    configs = [tmp_path / "tiny.yaml"]
    hack_config(training_config(release, configs), release, hacked)
    lean(f"--resume {hacked} -b tiny.yaml lean.yaml --max_steps 1")
    run = the_run(tmp_path / "logs")
    for steps in (2, 3):
        lean(f"--resume {run} --max_steps {steps}")
    hack_training(last(run), release, last(run))
    lean(f"--resume {run} --max_steps 4")
    write_index(tmp_path / "shards", autoencoder="0" * 64)
    with pytest.raises(UserError, match="made by another autoencoder"):
        lean(f"--resume {run} --max_steps 5")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_stepping_in_backward_trains_the_same_bits(train: Callable, tmp_path: Path, accumulate: int) -> None:
    options = f"--max_steps 3 --accumulate_grad_batches {accumulate} {SCHEDULE}"
    adamw = "target=torch.optim.AdamW {0}.params.fused=True"
    train(f"-l plain {options} {WHERE}.{adamw.format(WHERE)}")
    inner = f"{WHERE}.params.optimizer"
    train(
        f"-l bucketed {options} {WHERE}.target=ldm.optim.InBackward {inner}.{adamw.format(inner)} "
        f"{WHERE}.params.bucket_mb=0.1"
    )
    assert_same_training(the_run(tmp_path / "plain"), the_run(tmp_path / "bucketed"))
