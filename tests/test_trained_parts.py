"""Runs of main.py that train parts of a model, its text encoder along with the UNet, or with schedules."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_state_dict
from ldm.config.load import load_config
from ldm.release.configs import training_config
from ldm.release.hack import hack_config
from ldm.release.load import load_release
from ldm.release.merge import merge_files
from ldm.shards.writer import ShardWriter
from ldm.util import UserError
from tests.conftest import ROOT
from tests.test_several_processes import Runs
from tests.tiny_families import write_tiny
from tests.tiny_training import write_images
from tests.training_runs import (  # noqa: F401
    CONFIG,
    TEXT_TOWER,
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    run_main,
    state,
    the_run,
)

PARTS = "model.params.trained_parts"
SCHEDULE = "model.params.scheduler_config"
TORCH, WARM_UP = "target=torch.optim.lr_scheduler.", "target=ldm.lr_scheduler.LambdaWarmUpCosineScheduler"
STREAMED = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel"


def write_captioned(folder: Path, count: int = 12) -> None:
    """Write `captions.yaml`, which trains the text encoder too, and its shard: two captions per image, no encodings."""
    config = deepcopy(CONFIG)
    text = {"cond_stage_config": TEXT_TOWER, "cond_stage_key": "txt", "cond_stage_trainable": True}
    config["model"]["params"] |= text
    config["data"]["params"]["training_urls"] = "captioned.tar"
    OmegaConf.save(OmegaConf.create(config), folder / "captions.yaml")
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "captioned.tar"), count) as writer:
        for number in range(count):
            posterior = io.BytesIO()
            np.save(posterior, rng.standard_normal((8, 4, 4)).astype(np.float16))
            writer.write(
                f"{number:02}",
                {"f8.npy": posterior.getvalue(), "txt": f"cat number {number}\na cat, {number}".encode()},
            )


@pytest.fixture
def train_captions(train: Callable, tmp_path: Path) -> Callable[[str], int]:
    """Return a function that trains in this process, on `captions.yaml` unless it resumes."""
    write_captioned(tmp_path)
    return lambda line: train(line if "--resume" in line else f"-b captions.yaml {line}")


def steps_by_group(run: Path) -> list[set[float]]:
    """Return the numbers of steps of the parameters of each group of the optimizer in the last checkpoint."""
    saved = state(run / "checkpoints/last.ckpt")["optimizer_states"][0]
    return [
        {float(saved["state"][p]["step"]) if p in saved["state"] else 0.0 for p in group["params"]}
        for group in saved["param_groups"]
    ]


@pytest.mark.parametrize(
    ("overlay", "options", "schedule", "factors"),
    [
        (  # three steps per epoch
            "", "--accumulate_grad_batches 2 --gradient_clip_val 0.5 data.params.prior_urls=captioned.tar",
            f"{WARM_UP} interval=epoch params.warm_up_steps=1 params.lr_start=0.0 params.lr_max=1.0 params.lr_min=0.0 "
            "params.max_decay_steps=2",
            (0, 1 / 3, 2 / 3, 1),
        ),
        ("lean.yaml", "data.params.batch_size=2", f"{TORCH}CosineAnnealingWarmRestarts params.T_0=2", (1, 0.5, 1, 0.5)),
        ("smallest.yaml", "data.params.batch_size=2", f"{TORCH}StepLR params.step_size=2", (1, 1, 0.1, 0.1)),
        (  # 1.25 steps up, and 6.75 steps down
            "", f"{STREAMED} model.params.unet_config.params.stream_dtype=fp32",
            f"{TORCH}OneCycleLR params.total_steps=9 params.pct_start=0.25 params.anneal_strategy=linear",
            (0.04, 0.808, *(1 - (1 - 0.04 / 1e4) * (step - 1.25) / 6.75 for step in (2, 3))),
        ),
    ],
)  # fmt: skip
def test_a_run_that_resumes_before_the_text_encoder_trains(
    train_captions, tmp_path, overlay, options, schedule, factors
):
    parts = f"{PARTS}.rate_factors.cond_stage_model=0.1 {PARTS}.rate_factors.out=2 {PARTS}.from_step.cond_stage_model=2"
    described = " ".join(f"{SCHEDULE}.{each}" for each in schedule.split())
    line = f"{overlay} {options} {parts} {PARTS}.until_step.out=3 {described} --scale_lr False"
    train_captions(f"{line} -l straight --max_steps 4")
    train_captions(f"{line} -l resumed --max_steps 1")
    resumed = the_run(tmp_path / "resumed")
    assert steps_by_group(resumed) == [{1}, {1}, {0}]  # no optimizer state yet
    train_captions(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    assert steps_by_group(resumed) == [{4}, {3}, {2}]  # the other parts of the UNet, its output, the text encoder
    name = "lr-InBackward" if overlay else "lr-AdamW"
    for group, own in enumerate((1, 2, 0.1), start=1):
        rates = [float(rate) for rate in logged(resumed, f"{name}/pg{group}").values()]
        assert rates == pytest.approx([1e-3 * own * factor for factor in factors])


def test_parts_of_the_unet_train_alone(train, tmp_path, caplog):
    caplog.set_level("INFO")
    schedule = f"{SCHEDULE}.{TORCH}CosineAnnealingLR {SCHEDULE}.params.T_max=4"
    train(f"-l runs --max_steps 1 {PARTS}.train_only=[attn2,out] {schedule}")
    run = the_run(tmp_path / "runs")
    before = state(run / "checkpoints/last.ckpt")["state_dict"]
    train(f"--resume {run} --max_steps 3")
    content = state(run / "checkpoints/last.ckpt")
    weights = content["state_dict"]
    changed = {key for key in weights if key.startswith("model.") and not weights[key].equal(before[key])}
    assert changed == {key for key in weights if key.startswith("model.") and {"attn2", "out"} & {*key.split(".")}}
    for key in (key for key in weights if key.startswith("model.") and key not in changed):
        assert weights["model_ema." + key.removeprefix("model.").replace(".", "")].equal(weights[key])
    assert len(content["optimizer_states"][0]["state"]) == len(changed)
    count = sum(weights[key].numel() for key in changed)
    assert f"Training {count:,} of " in caplog.text and f"{count:,} at learning rate 2.000e-03" in caplog.text
    rates = [float(rate) for rate in logged(run, "lr-AdamW").values()]
    assert rates == pytest.approx([2e-3, 1e-3 * (1 + math.sqrt(0.5)), 1e-3])
    with pytest.raises(UserError, match="optimizer trained other parts"):
        train(f"--resume {run} --max_steps 4 {PARTS}.train_only=[attn1,out]")


@pytest.mark.parametrize(
    "options",
    ["-b lean.yaml data.params.batch_size=2 data.params.prior_urls=shards/s-000001.tar", "-b smallest.yaml", STREAMED],
    ids=["lean with a prior", "smallest", "minimal"],
)
def test_a_resumed_run_trains_the_same_parts_alone(train, tmp_path, options):
    line = f"{PARTS}.train_only=[attn2,out,'input_blocks.*.attn1'] {PARTS}.rate_factors.out=2 {PARTS}.until_step.out=3"
    line = f"{line} {options}"
    train(f"-l straight --max_steps 4 {line}")
    train(f"-l resumed --max_steps 1 {line}")
    resumed = the_run(tmp_path / "resumed")
    before = state(resumed / "checkpoints/last.ckpt")["state_dict"]
    train(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    assert steps_by_group(resumed) == [{4}, {3}]  # attention, and the output
    after = state(resumed / "checkpoints/last.ckpt")["state_dict"]
    changed = {key for key in after if key.startswith("model.") and not after[key].equal(before[key])}
    chosen = {key for key in after if key.startswith("model.") and {"attn2", "out"} & {*key.split(".")}}
    chosen |= {key for key in after if key.startswith("model.") and "input_blocks" in key and ".attn1." in key}
    # Rounding to bfloat16 may leave a weight whose gradient is 0, since a new output of an attention block is 0.
    assert changed <= chosen and {key for key in chosen if ".out." in key and ".attn" not in key} <= changed


def test_two_processes_train_like_one(tmp_path):
    runs = Runs(tmp_path)
    write_captioned(tmp_path)
    (tmp_path / "captions.yaml").rename(tmp_path / "tiny.yaml")
    warm_up = {"warm_up_steps": 0.5, "lr_start": 0.0, "lr_max": 1.0, "lr_min": 0.0, "max_decay_steps": 2}
    line = f"{PARTS}.from_step.cond_stage_model=2 {PARTS}.rate_factors.cond_stage_model=0.5 {SCHEDULE}.interval=epoch "
    line += f"{SCHEDULE}.{WARM_UP} "
    line += " ".join(f"{SCHEDULE}.params.{key}={value}" for key, value in warm_up.items())
    one = runs("one", f"{line} data.params.batch_size=4")
    two = runs("two", f"{line} data.params.batch_size=1 --accumulate_grad_batches 2", ranks=2)
    assert list(runs.losses("two").values()) == pytest.approx(list(runs.losses("one").values()), rel=1e-4)
    # An epoch has three steps, half an epoch rises, and the other three halves fall.
    factors = 0, 2 / 3, *(0.5 * (1 + math.cos(math.pi * (step / 3 - 0.5) / 1.5)) for step in (2, 3, 4))
    for run in (one, two):
        rates = [float(rate) for rate in logged(run, "lr-AdamW/pg2").values()]
        assert rates == pytest.approx([5e-4 * factor for factor in factors])
        assert steps_by_group(run) == [{5}, {3}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "shards/s-000000.tar: sample '0000' has no member 'txt', the caption"),
        (f"{PARTS}.freeze=[cond_stage]", "trained_parts: 'cond_stage' matches no parameter"),
        (f"{PARTS}.from_step.cond_stage_model=soon", "from_step.cond_stage_model 'soon': give a whole number"),
    ],
)
def test_mistakes(train_captions, line, said):
    with pytest.raises(UserError) as refused:
        train_captions(f"--max_steps 1 data.params.training_urls=shards/s-000000.tar {line}")
    assert said in str(refused.value)


def test_fsdp_refuses_parts(train):
    sharded = "--devices 2 --accelerator cpu --strategy fsdp model.params.use_ema=false"
    with pytest.raises(UserError, match="strategy fsdp trains the whole UNet at one learning rate"):
        train(f"--max_steps 1 {sharded} {PARTS}.train_only=[attn2]")


def test_epochs_of_a_stream_are_unknown(train):
    line = f"{SCHEDULE}.{TORCH}StepLR {SCHEDULE}.params.step_size=1 {SCHEDULE}.interval=epoch"
    urls = "data.params.training_urls=pipe:cat<shards/s-000000.tar --trust-config data.params.null_cond_dropout=0.0"
    with pytest.raises(UserError, match="streamed data have no known epoch"):
        train(f"--max_steps 2 {line} {urls}")


@pytest.mark.parametrize("key", ["sd1", "sd2_768_v", "sdxl"])
def test_the_recipe_with_the_text_encoder(key, tmp_path, monkeypatch, one_thread, run_tool):
    """Pre-encode, hack, train, merge: the trained layers of the encoder are in the release, the others unchanged."""
    monkeypatch.chdir(tmp_path)
    release, config = write_tiny(key, tmp_path)
    arguments = "--ckpt", release, "--config", config, "--images", write_images(tmp_path / "images", key)
    preencode = ROOT / "tools/preencode.py"
    assert run_tool(preencode, *arguments, "--out", "data/train/%06d.tar", "--num-workers", 0) is None
    base, options = [str(config), "train_text_encoder.yaml"], ""
    if key == "sdxl":
        described = load_config([config])
        with pytest.raises(UserError, match="no embedder of cond_stage_config has is_trainable: true"):
            training = training_config(release, base)
            hack_config(training, release, Path("start.ckpt"))
        for embedder in described.model.params.cond_stage_config.params.emb_models[:2]:
            embedder.is_trainable = True
        OmegaConf.save(described, "trainable.yaml")
        parts = {"rate_factors": {"cond_stage_model": None, "conditioner": 0.5}}
        OmegaConf.save({"model": {"params": {"trained_parts": parts}}}, "parts.yaml")
        base, options = ["trainable.yaml", base[1], "parts.yaml"], "data.params.null_cond_dropout=0.0"
    hack_config(training_config(release, base), release, Path("start.ckpt"))
    line = f"--resume start.ckpt --base {' '.join(base)} -t --no-test --max_steps 1 --scale_lr False "
    line += "model.base_learning_rate=1e-3 data.params.num_workers=0 data.params.batch_size=2 lightning.report=False "
    run_main(monkeypatch, f"{line} lightning.callbacks.image_logger.params.disabled=True {options}")
    last = the_run(Path("logs")) / "checkpoints/last.ckpt"
    merge_files(last, release, Path("mine.safetensors"), None, half=False)
    before, after = load_state_dict(release), load_state_dict("mine.safetensors")
    encoder = [name for name in before if name.startswith(("cond_stage_model.", "conditioner."))]
    changed = {name for name in encoder if not torch.equal(before[name], after[name])}
    assert any("layers.0." in name or "resblocks.0." in name for name in changed)
    assert not [name for name in changed if "embedding" in name]
    tuned = load_release("mine.safetensors", config)
    original = load_release(release, config)
    with torch.no_grad():
        encoded = [model.encode_captions(["a cat"])["t5"] for model in (original, tuned)]
    assert not torch.equal(*encoded)
