"""Training of an autoencoder's decoder alone: from a release, into a release, beside a set of the old one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_state_dict
from ldm.shards.index import read_index
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.tiny_training import write_images
from tests.training_runs import fixture_one_thread, run_main, the_run  # noqa: F401

HACK, MERGE, PREENCODE = (ROOT / "tools" / f"{name}.py" for name in ("hack_weights", "merge_release", "preencode"))
QUIET = "--no-test lightning.report=false lightning.callbacks.image_logger.target=null"


def test_a_release_gets_the_trained_decoder_and_its_sets_stay_valid(
    tiny_release: Path, tmp_path: Path, run_tool: Callable, monkeypatch: pytest.MonkeyPatch, one_thread: None
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
    for option in ("--vae", "--strength", "--weights", "--keep"):
        value = {"--vae": tiny_release, "--strength": 0.5, "--weights": "ema", "--keep": 0.9}[option]
        assert f"{option}: does not apply to logs/" in run_tool(*merge, option, value)
    assert run_tool(*merge) is None

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
