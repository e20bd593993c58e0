"""Training of an autoencoder's decoder alone: from a release, into a release, beside a set of the old one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.shards.index import read_index
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.tiny_training import write_images
from tests.training_runs import fixture_one_thread, run_main, the_run  # noqa: F401

HACK, MERGE, PREENCODE = (ROOT / "tools" / f"{name}.py" for name in ("hack_weights", "merge_release", "preencode"))
QUIET = "--no-test lightning.report=false lightning.callbacks.image_logger.target=null"


def test_a_release_gets_the_trained_decoder_and_its_sets_stay_valid(
    tiny_release: Path,
    tmp_path: Path,
    run_tool: Callable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    one_thread: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "images", "sd1")
    encoder = ("--ckpt", tiny_release, "--config", RELEASE_CONFIG, "--images", images, "--size", 64, "--num-workers", 0)
    assert run_tool(PREENCODE, *encoder, "--out", "set/%06d.tar") is None
    trained = "model.params.freeze_encoder=true model.params.lossconfig.params.kl_weight=0"
    data = (
        f"data.params.train.params.root={images} data.params.validation.params.root={images} data.params.batch_size=2"
    )
    run_main(
        monkeypatch,
        f"-b emoji_autoencoder.yaml -t -l logs --max_steps 1 {QUIET} {trained} {data} "
        f"model.params.ckpt_path={tiny_release}",
    )
    merge = (MERGE, "--release", tiny_release, "--out", "sharper.safetensors")
    for option, value, said in (
        ("--vae", tiny_release, "trains an autoencoder itself; leave out one of them"),
        ("--weights", "ema", "no moving average"),
        ("--keep", 0.9, "names no shards in data.params; give --strength"),
    ):
        assert said in run_tool(*merge, option, value)
    assert run_tool(*merge) is None
    assert "the training changed the encoder" not in caplog.text

    before, after = load_state_dict(tiny_release), load_state_dict(tmp_path / "sharper.safetensors")
    assert after.keys() == before.keys()
    changed = {key.removeprefix("first_stage_model.").split(".")[0] for key in after
               if not torch.equal(after[key], before[key])}  # fmt: skip
    assert changed == {"decoder", "post_quant_conv"}

    assert run_tool(HACK, "--release", "sharper.safetensors", "--base", "demo_tiny.yaml", "--out", "start.ckpt") is None
    run_main(
        monkeypatch,
        f"-b demo_tiny.yaml -t -l tuned --max_steps 1 {QUIET} --resume start.ckpt "
        "data.params.training_urls=set data.params.batch_size=2",
    )
    assert load_state_dict(the_run(tmp_path / "tuned") / "checkpoints/last.ckpt")
    assert run_tool(PREENCODE, "--ckpt", "sharper.safetensors", *encoder[2:], "--out", "again/%06d.tar") is None
    old, new = read_index(tmp_path / "set"), read_index(tmp_path / "again")
    assert old["autoencoder_used"] == new["autoencoder_used"] and old["autoencoder"] != new["autoencoder"]
    assert (tmp_path / "set/000000.tar").read_bytes() == (tmp_path / "again/000000.tar").read_bytes()


def autoencoder_training(release: dict[str, torch.Tensor], change: str, out: Path) -> Path:
    """Write a training checkpoint of the release's autoencoder, in float32, in which `change` is 0.5 larger."""
    prefix = "first_stage_model."
    weights = {key.removeprefix(prefix): value.float() for key, value in release.items() if key.startswith(prefix)}
    weights[change] = weights[change] + 0.5
    content = {"epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.5.0", "state_dict": weights, "loops": {}}
    torch.save(content, out)
    return out


def test_the_merge_of_an_autoencoder_keeps_dtypes_and_unchanged_values(
    tiny_release: Path, tmp_path: Path, run_tool: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    half = {key: value.half() for key, value in load_state_dict(tiny_release).items()}
    save_state_dict(half, tmp_path / "half.safetensors")
    merge = (MERGE, "--release", tmp_path / "half.safetensors", "--out", tmp_path / "m.safetensors", "--train-ckpt")
    key = "decoder.conv_in.bias"
    assert run_tool(*merge, autoencoder_training(half, key, tmp_path / "decoder.ckpt"), "--strength", 0.5) is None
    merged = load_state_dict(tmp_path / "m.safetensors")
    assert {key for key in merged if not torch.equal(merged[key], half[key])} == {f"first_stage_model.{key}"}
    torch.testing.assert_close(merged[f"first_stage_model.{key}"], half[f"first_stage_model.{key}"] + 0.25)
    assert all(value.dtype == half[key].dtype for key, value in merged.items())
    assert "the training changed the encoder" not in caplog.text

    changed = autoencoder_training(half, "encoder.conv_in.bias", tmp_path / "whole.ckpt")
    assert run_tool(*merge, changed) is None
    assert "the training changed the encoder: UNets and encoded sets of this release do not fit" in caplog.text
    diverged = autoencoder_training({key: value * torch.nan for key, value in half.items()}, key, tmp_path / "nan.ckpt")
    before = (tmp_path / "m.safetensors").read_bytes()
    assert "not finite, because the training diverged" in run_tool(*merge, diverged)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    wide = {**half, f"first_stage_model.{key}": torch.zeros(3)}
    said = run_tool(*merge, autoencoder_training(wide, key, tmp_path / "wide.ckpt"))
    assert "wide.ckpt into " in said and f"{key} has shape (3,) in the training" in said
