"""Previews that fail, and their intervals."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.callbacks import previews
from ldm.callbacks.previews import Previews
from ldm.config.load import build_model
from ldm.config.preview_prompts import PreviewPrompt
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.stored_prompts import StoredPrompts
from tests.training_runs import CONFIG

PROMPTS = [PreviewPrompt("Ein roter Apfel, größer!", steps=1, scale=1), PreviewPrompt("...", steps=1, scale=1)]


@pytest.fixture
def model() -> LatentDiffusion:
    config = OmegaConf.create({"model": CONFIG["model"]})
    config.model.params.use_ema = False
    return build_model(config).train()


@pytest.fixture
def callback() -> Previews:
    made = Previews(PROMPTS, lambda texts, noted, captions: None, every_n_train_steps=2)
    made._stored = StoredPrompts({text: {"t5": torch.ones(77, 8)} for p in PROMPTS for text in p.texts}, "release")
    return made


def at(step: int, folder: Path) -> Any:
    return SimpleNamespace(
        global_step=step, current_epoch=0, default_root_dir=str(folder), is_global_zero=True, loggers=[]
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("_e-")[0] for path in folder.glob("previews/*_gs-*.png"))


def test_previews_come_before_the_first_step_and_at_intervals(
    callback: Previews, model: LatentDiffusion, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for step in range(6):
        callback.on_train_batch_start(at(step // 2, tmp_path), model, {}, 0)  # two batches per step
        callback.on_train_batch_end(at((step + 1) // 2, tmp_path), model, None, {}, 0)
    assert names(tmp_path) == [f"{key}_gs-00000{n}" for key in ("01-ein-roter-apfel-gr-er", "02") for n in (0, 2)]
    assert torch.equal(torch.rand(3), expected) and model.training


def test_previews_at_a_time_interval(
    callback: Previews, model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback.every_n_train_steps, callback.minutes = None, 2
    now = [1000.0]
    monkeypatch.setattr(previews.time, "monotonic", lambda: now[0])
    for step in range(1, 8):
        now[0] += 50
        callback.on_train_batch_start(at(step - 1, tmp_path), model, {}, 0)
        callback.on_train_batch_end(at(step, tmp_path), model, None, {}, 0)
    assert [name[-1] for name in names(tmp_path) if name.startswith("02")] == ["0", "4", "7"]


def test_a_preview_that_is_not_finite_gives_a_warning(
    callback: Previews, model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.nn.init.constant_(model.model.diffusion_model.out[2].bias, float("nan"))
    callback.on_train_batch_start(at(0, tmp_path), model, {}, 0)
    assert "No previews at step 0: 'Ein roter Apfel, größer!', seed 42: DDIMSampler: the sample has NaN" in caplog.text
    assert names(tmp_path) == []


def test_a_preview_that_cannot_be_written_gives_one_warning(
    callback: Previews, model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "previews").write_text("a file in the place of the folder")
    for step in (0, 2):
        callback.on_train_batch_end(at(step, tmp_path), model, None, {}, 0)
    assert caplog.text.count("Previews cannot be written") == 1
    (tmp_path / "previews").unlink()
    callback.on_train_batch_end(at(4, tmp_path), model, None, {}, 0)
    assert len(names(tmp_path)) == 2 and "Previews can be written again" in caplog.text


def test_a_prompt_with_other_settings_gets_a_name_of_its_own(
    callback: Previews, model: LatentDiffusion, tmp_path: Path
) -> None:
    def start(first: PreviewPrompt, step: int) -> None:
        callback.prompts[0], callback._step, callback._chosen = first, -1, None
        callback.on_train_batch_start(at(step, tmp_path), model, {}, 0)

    start(PROMPTS[0], 0)
    start(replace(PROMPTS[0], seed=7), 1)  # a resumed run
    start(replace(PROMPTS[0], seed=7), 2)
    start(PROMPTS[0], 3)
    assert [name for name in names(tmp_path) if name.startswith("01")] == [
        "01-ein-roter-apfel-gr-er-2_gs-000001",
        "01-ein-roter-apfel-gr-er_gs-000000",
    ]


def test_a_preview_replaces_the_one_of_its_step_in_another_epoch(
    callback: Previews, model: LatentDiffusion, tmp_path: Path
) -> None:
    for epoch in (1, 0):
        callback.on_train_batch_end(
            SimpleNamespace(**{**vars(at(2, tmp_path)), "current_epoch": epoch}), model, None, {}, 0
        )
        callback._step = -1
    assert [path.name for path in tmp_path.glob("previews/02_*.png")] == ["02_gs-000002_e-000000_b-000000.png"]
