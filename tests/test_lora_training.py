"""Tests of training a LoRA through main.py and the tools: resuming, tiers, and the release and the file of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import ema_key, load_state_dict, save_checkpoint, save_state_dict, weights_of
from ldm.checkpoint.keys import is_factor
from ldm.config.load import load_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.release.load import load_release
from ldm.release.lora_merging import Lora
from ldm.training.resume import build_from, read_training_checkpoint
from ldm.util import UserError
from tests.conftest import ROOT
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    logged,
    state,
    the_run,
    write_release,
)

TOOLS = {name: ROOT / "tools" / f"{name}.py" for name in ("hack_weights", "merge_release", "extract_lora")}
WHERE = "model.params.lora"
LORA = f"-b lora.yaml model.base_learning_rate=1e-2 {WHERE}.rank=3 {WHERE}.alpha=6"
STREAMED = "model.params.unet_config.target=ldm.modules.diffusionmodules.streamed.StreamedUNetModel "
STREAMED += "model.params.unet_config.params.stream_dtype=fp32"
KEYED = "model.params.optimizer_config.params.optimizer.params.keyed_rounding=true"
PREVIEWS = "--previews prompts.txt " + " ".join(
    f"lightning.previews.{setting}"
    for setting in ("release=release.safetensors", "config=release.yaml", "every_n_train_steps=3")
)
VALIDATION = "data.params.val_urls=shards/s-000001.tar --val_check_interval 3"
ALL = f"{WHERE}.targets=[attn1,attn2,in_layers,proj_in,skip_connection,ff]"


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    "options",
    [
        f"--accumulate_grad_batches 2 data.params.prior_urls=shards/s-000001.tar {WHERE}.dropout=0.2 {ALL}",
        "-b lean.yaml",
        f"{STREAMED} model.params.use_ema=false",
    ],
    ids=["prior", "lean", "minimal"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(train: Callable, tmp_path: Path, options: str) -> None:
    train(f"-l straight --max_steps 4 {LORA} {options}")
    train(f"-l resumed --max_steps 2 {LORA} {options}")
    resumed = the_run(tmp_path / "resumed")
    train(f"--resume {resumed} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), resumed)
    content = state(last(resumed))
    factors = {key for key in content["state_dict"] if is_factor(key)}
    trained = {key for key in factors if not key.endswith("alpha")}
    moments = content["optimizer_states"][0]["state"]
    assert len(moments) == len(trained) > 0  # the memory gain: no state for the weights
    averages = {key for key in content["state_dict"] if key.startswith("model_ema.diffusion")}
    assert len(averages) == (0 if "use_ema" in options else len(trained))
    assert {content["state_dict"][key].dtype for key in factors} == {torch.float32}


@pytest.mark.parametrize(("one", "other"), [("", STREAMED), (f"-b lean.yaml {KEYED}", "-b smallest.yaml")])
def test_streamed_weights_train_the_same_factors(train: Callable, tmp_path: Path, one: str, other: str) -> None:
    train(f"-l one --max_steps 3 {LORA} {one}")
    train(f"-l other --max_steps 3 {LORA} {other}")
    assert_same_training(the_run(tmp_path / "one"), the_run(tmp_path / "other"))


@pytest.fixture(name="trained")
def fixture_trained(train: Callable, run_tool: Callable, tmp_path: Path) -> Path:
    """Train a LoRA of a release, with previews and validation, and return the run's last.ckpt."""
    (tmp_path / "prompts.txt").write_text("a red apple --w 16 --h 8 --s 2\n")
    release = load_state_dict(write_release(tmp_path))
    averages = [key for key in release if key.startswith("model_ema.")]
    save_state_dict({key: value for key, value in release.items() if key not in averages}, "release.safetensors")
    hack = ("--release", "release.safetensors", "--base", "tiny.yaml", "lora.yaml", "--out", "start.ckpt")
    assert run_tool(TOOLS["hack_weights"], *hack) is None
    train(f"-l logs --resume start.ckpt -b tiny.yaml --max_steps 3 {LORA} {ALL} {PREVIEWS} {VALIDATION}")
    return last(the_run(tmp_path / "logs"))


def predicted(model: LatentDiffusion) -> Tensor:
    """Return a prediction with the averaged weights, if the model has them."""
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad(), model.eval().ema_scope():
        return model.apply_model(x, torch.tensor([3, 30]), {"c_crossattn": [context]})


def test_release_and_file_predict_what_the_training_does(
    trained: Path, train: Callable, run_tool: Callable, tmp_path: Path
) -> None:
    run = trained.parents[1]
    assert list(run.glob("previews/*_gs-000003_*.png")) and logged(run, "val/loss_simple_ema")
    before, after = load_state_dict("release.safetensors"), state(trained)["state_dict"]
    weights = [key for key in after if key.startswith("model.") and not is_factor(key)]
    assert all(torch.equal(after[key], before[key]) for key in weights)  # frozen

    release, own = ("--release", "release.safetensors"), ("--train-ckpt", trained)
    assert run_tool(TOOLS["merge_release"], *own, *release, "--out", "merged.safetensors") is None
    assert run_tool(TOOLS["extract_lora"], *own, "--out", "lora.safetensors") is None
    assert run_tool(TOOLS["merge_release"], *release, "--lora", "lora.safetensors", "--out", "added.ckpt") is None
    assert run_tool(TOOLS["merge_release"], *own, *release, "--strength", 0.5, "--out", "half.safetensors") is None

    model = build_from(load_config(sorted(run.glob("configs/*-project.yaml"))), read_training_checkpoint(trained))
    expected = predicted(model)
    files = ("release.safetensors", "merged.safetensors", "added.ckpt")
    base, *others = (load_release(path, "release.yaml") for path in files)
    others.append(load_release("release.safetensors", "release.yaml", loras=[Lora(Path("lora.safetensors"))]))
    for other in others:
        torch.testing.assert_close(predicted(other), expected, rtol=1e-4, atol=1e-5)
    assert (predicted(base) - expected).abs().max() > 1e-2
    merged, half = load_state_dict("merged.safetensors"), load_state_dict("half.safetensors")
    changed = [key for key in before if not torch.equal(before[key], merged[key])]
    assert len(changed) == len([key for key in after if key.endswith(".lora.down")])
    for key in changed:
        torch.testing.assert_close(half[key], (before[key] + merged[key]) / 2)


def test_weights_chooses_the_factors_or_their_average(trained: Path, run_tool: Callable) -> None:
    files = {}
    for kind in ("ema", "raw"):
        options = ("--train-ckpt", trained, "--weights", kind, "--half", "--out", f"{kind}.safetensors")
        assert run_tool(TOOLS["extract_lora"], *options) is None
        files[kind] = load_state_dict(f"{kind}.safetensors")
    weights = state(trained)["state_dict"]
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora.up"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    raw, ema = weights[key], weights[ema_key(key)]
    assert torch.equal(files["raw"][f"{name}.lora_up.weight"], raw.half())
    assert torch.equal(files["ema"][f"{name}.lora_up.weight"], ema.half())
    assert files["raw"][f"{name}.alpha"] == 6 and len(files["raw"][f"{name}.lora_down.weight"]) == 3


REFUSED = {
    "model.params.lora=null": "has unexpected .*lora.down.*of a LoRA training: add lora.yaml to --base",
    f"{WHERE}.rank=2": r"has shape \(3, .*its LoRA has the rank 3; set model.params.lora.rank to it",
    f"{WHERE}.alpha=2": "lora.alpha is 6, the config's is 2; set model.params.lora.alpha=6",
    f"{WHERE}.targets=[attn1]": "its LoRA has other targets; give those of its run",
    "model.params.cond_stage_trainable=true": "lora trains factors of the UNet alone",
    "model.params.unet_trainable=attn": "lora trains factors in place of weights, and unet_trainable: attn",
    " ".join(
        f"lightning.callbacks.decay.{setting}"
        for setting in (
            *("target=ldm.callbacks.decay_to_start.DecayToStart", "params.start=release.safetensors"),
            "params.weight=1",
        )
    ): "decay_to_start: a LoRA starts without a change",
    "--devices 2 --accelerator cpu --strategy fsdp model.params.use_ema=false": "cannot shard the factors of a LoRA",
}


def test_refusals(trained: Path, train: Callable) -> None:
    for options, message in REFUSED.items():
        with pytest.raises(UserError, match=message):
            train(f"--resume {trained.parents[1]} --max_steps 4 {options}")


def test_tools_refuse_what_they_cannot_use(trained: Path, run_tool: Callable, tmp_path: Path) -> None:
    out = ("--out", "x.safetensors")
    extract = TOOLS["extract_lora"]
    assert "trains weights, and no LoRA" in run_tool(extract, "--train-ckpt", "start.ckpt", *out)
    assert "holds a LoRA in training" in run_tool(extract, "--base", "release.safetensors", "--tuned", trained, *out)
    content = state(trained)
    key = next(key for key in content["state_dict"] if key.endswith(".lora.up"))
    ema = ema_key(key)
    shape = content["state_dict"][ema].shape
    damaged = {
        "its factors are not finite, because the training diverged": {ema: torch.full(shape, torch.nan)},
        "which do not fit": {ema: torch.zeros(3)},
    }
    for message, values in damaged.items():
        save_checkpoint({**content, "state_dict": {**content["state_dict"], **values}}, tmp_path / "damaged.ckpt")
        for tool, more in ((extract, ()), (TOOLS["merge_release"], ("--release", "release.safetensors"))):
            assert message in run_tool(tool, "--train-ckpt", "damaged.ckpt", *more, *out)
    weights = {name: value for name, value in weights_of(content, "x").items() if name != ema}
    save_checkpoint({**content, "state_dict": weights}, tmp_path / "damaged.ckpt")
    assert f"the checkpoint lacks {ema}" in run_tool(extract, "--train-ckpt", "damaged.ckpt", *out)
    assert not (tmp_path / "x.safetensors").exists()


def test_new_weights_under_a_lora_start_it_again(trained: Path, train: Callable, run_tool: Callable) -> None:
    assert run_tool(TOOLS["hack_weights"], "--release", "release.safetensors", "--train-ckpt", trained) is None
    assert not any(is_factor(key) for key in state(trained)["state_dict"])
    train(f"--resume {trained.parents[1]} --max_steps 4")
    ups = [value for key, value in state(trained)["state_dict"].items() if key.endswith(".lora.up")]
    assert max(float(up.abs().max()) for up in ups) <= 0.0201  # one step of Adam
