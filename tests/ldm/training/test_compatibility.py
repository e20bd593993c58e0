"""What cannot be combined is refused before a run begins, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.precision import MixedPrecision

from ldm.config.load import build_model, load_config, plain
from ldm.training.compatibility import check_compatibility, check_in_backward, check_low_precision
from ldm.training.precision import Bfloat16Weights
from ldm.util import UserError
from tests.training_runs import CONFIG, fixture_one_thread, fixture_train, logged, the_run  # noqa: F401

WHERE = "model.params.optimizer_config"
IN_BACKWARD = f"{WHERE}.target=ldm.optim.InBackward {WHERE}.params.optimizer.target=torch.optim.AdamW"
FAULTS = "lightning.callbacks.numerical_faults.params"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gradient_clip_val 1.0", "gradient_clip_val=1.0 .* optimizer_config.params.clip_each"),
        (f"{FAULTS}.on_fault=skip", "on_fault=skip judges .*InBackward takes most of a step before all are there; le"),
        (f"{FAULTS}.grad_norm_factor=10", "grad_norm_factor=10 judges .*InBackward takes most of a step before"),
        ("--accelerator cpu --devices 2", "over 2 devices; train on one device, or name its inner optimizer"),
    ],
)
def test_refusals(train: Callable[[str], int], tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(f"--max_steps 1 {IN_BACKWARD} {options}")
    assert not list(tmp_path.glob("logs/*"))


def test_a_scaled_loss_is_refused() -> None:
    model = SimpleNamespace(optimizer_config={"target": "ldm.optim.InBackward"})
    scaling = MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cpu"))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, plugins=[scaling])
    with pytest.raises(
        UserError, match=r"precision=16-mixed scales the loss.* use --precision bf16-true or bf16-mixed"
    ):
        check_in_backward(model, trainer)


@pytest.mark.parametrize("optimizer", [None, {"target": "torch.optim.AdamW"}])
def test_check_low_precision_warns_of_bfloat16_weights_rounded_to_nearest(optimizer, caplog) -> None:
    model = build_model(OmegaConf.create(CONFIG))
    model.optimizer_config = optimizer
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    check_compatibility(model, Trainer(plugins=[Bfloat16Weights()], **options))
    assert "precision=bf16-true rounds each update" in caplog.text and "lean.yaml" in caplog.text
    caplog.clear()
    lean = plain(load_config(["lean.yaml"]))["model"]["params"]["optimizer_config"]
    for sound in (lean, lean["params"]["optimizer"]):
        model.optimizer_config = sound
        check_low_precision(model, Trainer(plugins=[Bfloat16Weights()], **options))
    check_low_precision(model, Trainer(precision="bf16-mixed", **options))
    assert "precision" not in caplog.text


def test_check_low_precision_refuses_float16_weights() -> None:
    model = build_model(OmegaConf.create(CONFIG))
    trainer = SimpleNamespace(precision="16-true")
    with pytest.raises(UserError, match=r"precision=16-true trains float16 weights, which diverge; use --precision"):
        check_low_precision(model, trainer)


@pytest.mark.parametrize("options", ["--precision bf16-mixed", "--precision 32", "-b tiny.yaml fast.yaml"])
def test_the_default_optimizer_may_clip(options: str, train: Callable[[str], int], tmp_path: Path) -> None:
    if "fast" in options:
        options += " model.params.unet_config.params.compile_mode=null data.params.batch_size=2"
    assert train(f"--max_steps 2 {options} --gradient_clip_val 1.0") == 0
    assert logged(the_run(tmp_path / "logs"), "train/loss")


def test_other_optimizers_may_clip(train: Callable[[str], int], tmp_path: Path) -> None:
    assert train(f"--max_steps 1 {WHERE}.target=torch.optim.AdamW --gradient_clip_val 1.0") == 0
    assert the_run(tmp_path / "logs")


def test_clipping_each_gradient_trains(train: Callable[[str], int], tmp_path: Path) -> None:
    assert train(f"--max_steps 1 {IN_BACKWARD} {WHERE}.params.clip_each=0.1") == 0
    assert the_run(tmp_path / "logs")
