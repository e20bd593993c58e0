"""Tests that settings that cannot be combined are refused before a run begins, with advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.precision import MixedPrecision

from ldm.config.load import build_model
from ldm.training.compatibility import check_in_backward, check_streaming
from ldm.util import UserError
from tests.training_runs import CONFIG, fixture_one_thread, fixture_train, the_run  # noqa: F401

WHERE = "model.params.optimizer_config"
IN_BACKWARD = f"{WHERE}.target=ldm.optim.InBackward {WHERE}.params.optimizer.target=torch.optim.AdamW"
FAULTS = "lightning.callbacks.numerical_faults.params"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gradient_clip_val 1.0", "gradient_clip_val=1.0 .* optimizer_config.params.clip_each"),
        (f"{FAULTS}.on_fault=skip", "on_fault=skip needs all gradients .*InBackward steps during backward; le"),
        (f"{FAULTS}.grad_norm_factor=10", "grad_norm_factor=10 needs all gradients .*InBackward steps during backward"),
        ("--accelerator cpu --devices 2", "over 2 devices; train on one device, or use its inner optimizer"),
    ],
)
def test_refusals(train: Callable[[str], int], tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(f"--max_steps 1 {IN_BACKWARD} {options}")
    assert not list(tmp_path.glob("logs/*"))


def test_streamed_bfloat16_weights_do_not_compute_in_float16() -> None:
    config = OmegaConf.create(CONFIG)
    unet = config.model.params.unet_config
    unet.target = "ldm.modules.diffusionmodules.streamed.StreamedUNetModel"
    with pytest.raises(UserError, match=r"precision=16-mixed computes in float16, .*stream_dtype bf16 .*bf16-mixed"):
        check_streaming(build_model(config), SimpleNamespace(precision="16-mixed"))
    check_streaming(build_model(config), SimpleNamespace(precision="bf16-mixed"))
    unet.params.stream_dtype = "fp32"
    check_streaming(build_model(config), SimpleNamespace(precision="16-mixed"))


def test_a_scaled_loss_is_refused() -> None:
    model = SimpleNamespace(optimizer_config={"target": "ldm.optim.InBackward"})
    scaling = MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cpu"))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, plugins=[scaling])
    with pytest.raises(
        UserError, match=r"precision=16-mixed scales the loss.* use --precision bf16-true or bf16-mixed"
    ):
        check_in_backward(model, trainer)


def test_other_optimizers_may_clip(train: Callable[[str], int], tmp_path: Path) -> None:
    assert train(f"--max_steps 1 {WHERE}.target=torch.optim.AdamW --gradient_clip_val 1.0") == 0
    assert the_run(tmp_path / "logs")


def test_clipping_each_gradient_trains(train: Callable[[str], int], tmp_path: Path) -> None:
    assert train(f"--max_steps 1 {IN_BACKWARD} {WHERE}.params.clip_each=0.1") == 0
    assert the_run(tmp_path / "logs")


@pytest.mark.parametrize("options", ["", f"{WHERE}.target=torch.optim.AdamW {WHERE}.params.fused=True"])
def test_clipping_works_with_mixed_precision_and_fused_optimizers(
    train: Callable[[str], int], tmp_path: Path, options: str
) -> None:
    assert train(f"--max_steps 2 --precision bf16-mixed --gradient_clip_val 1.0 {options}") == 0
    assert the_run(tmp_path / "logs")


def test_check_rounding_refuses_float16_weights(train: Callable[[str], int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"16-true trains float16 weights, which diverges.*lean.yaml"):
        train("--max_steps 1 --precision 16-true")
    assert not list(tmp_path.glob("logs/*"))


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ("", True),
        (IN_BACKWARD, True),
        (f"{WHERE}.target=ldm.optim.low_bit.AdamW8bit", False),
        (f"{WHERE}.target=ldm.optim.low_bit.AdamW8bit {WHERE}.params.bf16_stochastic_round=false", True),
    ],
)
def test_check_rounding_warns_about_bfloat16_rounded_to_the_nearest(
    train: Callable[[str], int], caplog: pytest.LogCaptureFixture, options: str, warns: bool
) -> None:
    assert train(f"--max_steps 1 --precision bf16-true {options}") == 0
    assert ("without stochastic rounding loses most updates" in caplog.text) is warns
    assert ("lean.yaml" in caplog.text) is warns
