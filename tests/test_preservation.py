"""Tests of main.py with each kind of preservation: resuming, logged losses, and the preservation itself."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.config.load import build_model, load_config
from ldm.shards import npy
from ldm.shards.writer import ShardWriter
from ldm.util import UserError
from tests.conftest import ROOT
from tests.training_runs import assert_same_training, fixture_one_thread, fixture_train, logged, the_run  # noqa: F401

PRIOR = "data.params.prior_urls=prior.tar data.params.prior_ratio=1.5"
TEACHER = "data.params.prior_urls=taught.tar model.params.prior_target=teacher"
_CALLBACK = "lightning.callbacks.decay"
_PARAMS = {"start": "start.safetensors", "weight": 100, "every_n_steps": 2}
CONSISTENCY = (
    "data.params.training_urls=taught.tar data.params.null_cond_dropout=0 model.params.loss_config.target="
    "ldm.models.diffusion.consistency.DirectConsistency"
)
SPLIT = "model.params.timestep_config.target=ldm.models.diffusion.timesteps.Split"
PULL = " ".join(
    f"lightning.callbacks.pull.{key}"
    for key in (
        "target=ldm.callbacks.pull_to_start.PullToStart", "params.start=start.safetensors", "params.weight=1000",
    )
)  # fmt: skip
DECAY = f"{_CALLBACK}.target=ldm.callbacks.decay_to_start.DecayToStart " + " ".join(
    f"{_CALLBACK}.params.{key}={value}" for key, value in _PARAMS.items()
)


@pytest.fixture(autouse=True)
def _inputs(train, tmp_path):
    """Write a prior of five latents, the same with predictions, and weights to decay to."""
    rng = np.random.default_rng(1)
    for name, k in (("prior.tar", 0), ("taught.tar", 3)):
        with ShardWriter(str(tmp_path / name), 1) as writer:
            for number in range(5):
                arrays = {"f8": rng.standard_normal((4, 4, 4)), "t5": rng.standard_normal((77, 8))}
                if k:
                    arrays |= {key: rng.standard_normal((k, 4, 4, 4)) for key in ("noise", "prediction")}
                members = {f"{key}.npy": npy.encode(array.astype(np.float16)) for key, array in arrays.items()}
                if k:
                    members["t.npy"] = npy.encode(np.arange(k, dtype=np.int32) * 10)
                writer.write(f"p{number}", members)
    torch.manual_seed(0)
    save_state_dict(build_model(load_config([tmp_path / "tiny.yaml"])).state_dict(), tmp_path / "start.safetensors")


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (3, f"{PRIOR} data.params.num_workers=2"),  # within an epoch of six batches
        (8, f"{TEACHER} data.params.num_workers=2"),  # within the second, each sample at its second answer
        (3, f"{DECAY}"),  # between two decays
        (4, f"{TEACHER} {DECAY} --accumulate_grad_batches 2"),
        (3, f"{PULL} {PRIOR} {SPLIT} --gradient_clip_val 1"),
        (4, f"{CONSISTENCY} {PRIOR}"),  # within an epoch of three batches
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path, stop, options):
    train(f"-l straight --max_steps {stop + 4} {options}")
    train(f"-l resumed --max_steps {stop} {options}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps {stop + 4}")
    assert_same_training(the_run(tmp_path / "straight"), resumed)


def test_workers_change_nothing(train, tmp_path):
    train(f"-l plain --max_steps 8 {TEACHER}")
    train(f"-l busy --max_steps 8 {TEACHER} data.params.num_workers=2")
    assert_same_training(the_run(tmp_path / "plain"), the_run(tmp_path / "busy"))


def test_both_losses_are_logged_and_add_up(train, tmp_path, caplog):
    train(f"--max_steps 2 {PRIOR} model.params.prior_loss_weight=0.5")
    run = the_run(tmp_path / "logs")
    own, prior, both = (logged(run, f"train/{name}") for name in ("loss_simple", "loss_prior", "loss"))
    assert sorted(own) == [0, 1]
    for step in own:
        assert float(both[step]) == pytest.approx(float(own[step]) + 0.5 * float(prior[step]), rel=1e-5)
    assert set(logged(run, "lr-AdamW").values()) == {"0.002"}  # of the batch_size, without the prior's samples


def test_validation_has_no_prior(train, tmp_path):
    train(f"--max_steps 2 {PRIOR} data.params.val_urls=shards/s-000000.tar --val_check_interval 2")
    run = the_run(tmp_path / "logs")
    assert logged(run, "val/loss_simple") and not logged(run, "val/loss_prior")


def distance(path, start):
    """Return the distance of the trained weights of a checkpoint from those of `start`."""
    weights, begun = load_state_dict(path), load_state_dict(start)
    return sum((weights[key] - begun[key]).square().sum() for key in begun if key.startswith("model.")).sqrt()


@pytest.mark.parametrize("option", [DECAY, PULL])
def test_the_weights_stay_near_their_start(train, tmp_path, option):
    start = tmp_path / "start.safetensors"
    options = f"--max_steps 12 --no-test model.params.ckpt_path={start}"
    train(f"-l free {options}")
    train(f"-l held {options} {option}")
    free, held = (distance(the_run(tmp_path / name) / "checkpoints/last.ckpt", start) for name in ("free", "held"))
    assert 0 < held < 0.7 * free


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data.params.prior_urls=nowhere.tar", "nowhere.tar"),
        ("data.params.prior_url=prior.tar", "unknown key 'prior_url' .*; did you mean 'prior_urls'"),
        ("model.params.prior_target=teacher", "prior_urls names no shards"),
        (f"{PRIOR} model.params.prior_target=teacher", r"no member 't\.npy'; write .*make_prior\.py --teacher"),
        (f"{DECAY} lightning.callbacks.decay.params.start=prior.tar", r"prior\.tar: not a checkpoint"),
        (f"{DECAY} model.params.unet_config.params.num_res_blocks=2", r"start\.safetensors: model\..* is missing"),
        (f"{DECAY} lightning.callbacks.decay.params.weight=1e4", "overshoots the start"),
        (CONSISTENCY.replace("taught", "prior"), r"no member 't\.npy'; write .*make_prior\.py --teacher"),
        (f"{CONSISTENCY} {SPLIT}", "leave out timestep_config"),
        (f"{PULL} lightning.callbacks.pull.params.weight=-1", "weight -1: give a number above 0"),
        (f"{PULL} -b lean.yaml tiny.yaml", "adds to the gradients before a step"),
    ],
)
def test_mistakes_are_refused_in_one_line_and_write_nothing(train, tmp_path, line, message):
    with pytest.raises(UserError, match=message) as caught:
        train(f"--max_steps 2 {line}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("logs/*"))


def test_merge_keep_finds_a_strength_on_the_shards_of_the_run(train, tmp_path, run_tool):
    release, generator = tmp_path / "release.safetensors", torch.Generator().manual_seed(1)
    weights = {key: value for key, value in load_state_dict("start.safetensors").items() if "model_ema" not in key}
    head = {key: torch.randn(value.shape, generator=generator) for key, value in weights.items() if ".out.2." in key}
    save_state_dict({**weights, **{key: 0.05 * value for key, value in head.items()}}, release)
    start = f"model.params.ckpt_path={release} data.params.null_cond_dropout=0"
    train(f"--max_steps 30 {start} {PRIOR} data.params.batch_size=12 data.params.prior_ratio=0.2")
    last = the_run(tmp_path / "logs") / "checkpoints/last.ckpt"
    merge = partial(run_tool, ROOT / "tools/merge_release.py", "--train-ckpt", last, "--release", release)
    assert merge("--out", "whole.safetensors") is None
    assert merge("--keep", 0.5, "--out", "kept.safetensors") is None
    assert not list(last.parent.glob(".keep*"))
    key = "model.diffusion_model.out.2.weight"
    base, whole, kept = (
        load_state_dict(path)[key] for path in (release, tmp_path / "whole.safetensors", tmp_path / "kept.safetensors")
    )
    strength = ((kept - base).norm() / (whole - base).norm()).item()
    assert 0.1 < strength < 0.95 and strength * 10 == pytest.approx(round(strength * 10), abs=1e-3)
    assert "--keep finds the strength" in merge("--keep", "--strength", 0.5, "--out", "x.safetensors")
    assert "--keep 2.0: give a number" in merge("--keep", 2, "--out", "x.safetensors")
    shutil.copy(last, tmp_path / "alone.ckpt")
    alone = run_tool(ROOT / "tools/merge_release.py", "--train-ckpt", "alone.ckpt", "--release", release, "--keep")
    assert "alone.ckpt lies in no run folder" in alone
    assert not (tmp_path / "x.safetensors").exists()
