"""Tests of the pull to the start by hand, on two parameters of different sizes, and of its refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.callbacks.pull_to_start import PullToStart
from ldm.checkpoint import save_state_dict
from ldm.util import UserError

RATE, WEIGHT = 0.5, 0.25


class Pulled(pl.LightningModule):
    """Module with weights of one and of four elements, each with gradient 1. Records the weights and the penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ParameterList([torch.nn.Parameter(torch.full((n,), 3.0)) for n in (1, 4)])
        self.seen: list[list[float]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return sum(weight.sum() for weight in self.inner)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        penalty = self.trainer.callback_metrics["train/loss_pull"].item()
        self.seen.append([*(weight[0].item() for weight in self.inner), penalty])


def fit(folder: Path, callback: PullToStart, **options: object) -> Pulled:
    module = Pulled()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(**quiet, enable_checkpointing=False, default_root_dir=folder, callbacks=[callback], **options)
    trainer.fit(module, DataLoader([torch.zeros(1)] * 4))
    return module


@pytest.fixture
def start(tmp_path: Path) -> str:
    path = tmp_path / "start.safetensors"
    save_state_dict({"inner.0": torch.tensor([1.0]), "inner.1": torch.tensor([1.0, 3.0, 3.0, 3.0])}, path)
    return str(path)


def test_the_steps_by_hand(start: str, tmp_path: Path) -> None:
    """θ ← θ − lr · (1 + 2λ / n · (θ − θ⁰)) from θ = 3, with the first elements' θ⁰ = 1 and the others' 3."""
    module = fit(tmp_path, PullToStart(start, WEIGHT), max_steps=2)
    # step 1: 3 − 0.5 (1 + 0.5 · 2) = 2 and 3 − 0.5 (1 + 0.125 · 2) = 2.375; the penalty is 0.25 (4 + 4 / 4) = 1.25
    assert module.seen[0] == pytest.approx([2.0, 2.375, 1.25])
    # step 2: 2 − 0.5 (1 + 0.5 · 1) = 1.25 and 2.375 − 0.5 (1 + 0.125 · 1.375) = 1.7890625. The other three elements
    # are at 2.5, so that the penalty is 0.25 (1 + (1.375² + 3 · 0.5²) / 4).
    assert module.seen[1] == pytest.approx([1.25, 1.7890625, 0.25 * (1 + (1.375**2 + 0.75) / 4)])


def test_the_penalty_is_clipped_with_the_loss(start: str, tmp_path: Path) -> None:
    module = fit(
        tmp_path, PullToStart(start, WEIGHT), max_steps=1, gradient_clip_val=1.0, gradient_clip_algorithm="norm"
    )
    norm = (2.0**2 + 1.25**2 + 3 * 1.0**2) ** 0.5
    assert module.seen[0][:2] == pytest.approx([3 - RATE * 2.0 / norm, 3 - RATE * 1.25 / norm], rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (
            {"inner.0": torch.zeros(3)},
            {},
            r"pull_to_start: .*start\.ckpt: inner\.0 has the shape \(3,\), and the trained weight has \(1,\)",
        ),
        ({"other": torch.zeros(2)}, {}, r"pull_to_start: .*start\.ckpt: inner\.0 is missing"),
        (None, {}, r"start\.ckpt: no such file"),
        ({}, {"weight": 0}, "weight 0: give a number above 0"),
    ],
)
def test_a_file_or_value_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, weights: dict[str, torch.Tensor] | None, options: dict[str, float], message: str
) -> None:
    path = tmp_path / "start.ckpt"
    if weights is not None:
        torch.save(weights, path)
    with pytest.raises(UserError, match=message) as caught:
        fit(tmp_path, PullToStart(str(path), **{"weight": WEIGHT, **options}), max_steps=1)
    assert "\n" not in str(caught.value)


def test_scaled_gradients_are_refused(start: str) -> None:
    plugin = SimpleNamespace(scaler=object())
    trainer = SimpleNamespace(optimizers=[], precision_plugin=plugin, precision="16-mixed")
    with pytest.raises(UserError, match="precision=16-mixed scales the gradients"):
        PullToStart(start, WEIGHT).on_train_start(trainer, torch.nn.Module())


def test_accumulated_batches_are_pulled_once(start: str, tmp_path: Path) -> None:
    module = Pulled()
    module.on_train_batch_end = lambda *_: None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        **quiet, enable_checkpointing=False, default_root_dir=tmp_path, max_steps=1, accumulate_grad_batches=2,
        callbacks=[PullToStart(start, WEIGHT)],
    )  # fmt: skip
    trainer.fit(module, DataLoader([torch.zeros(1)] * 4))
    assert module.inner[0].item() == pytest.approx(2.0)
