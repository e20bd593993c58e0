"""Forecasts on disk, and made in a process of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.config.load import load_config
from ldm.planning import forecast as module
from ldm.planning import step
from ldm.planning.forecast import forecast, start_forecast
from ldm.util import UserError

CONFIG = load_config(["demo_tiny.yaml"])
PEAK = {"weights": 3, "activations": 4}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "latent-finetune" / "forecasts"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The batches that `peak_of_step` was asked for."""
    calls: list[int | None] = []

    def peak_of_step(config, images):
        calls.append(images)
        return PEAK

    monkeypatch.setattr(step, "peak_of_step", peak_of_step)
    return calls


def test_forecast_is_made_once_per_config_batch_and_version(asked, monkeypatch):
    assert forecast(CONFIG) == forecast(CONFIG) == PEAK and asked == [None]
    forecast(CONFIG, 2)
    forecast(OmegaConf.merge(CONFIG, {"model": {"params": {"use_ema": False}}}))
    assert asked == [None, 2, None]
    monkeypatch.setattr(module.metadata, "version", lambda name: "new")
    forecast(CONFIG)
    assert len(asked) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weights": "3"}'])
def test_forecast_makes_a_damaged_one_anew(asked, folder, content):
    forecast(CONFIG)
    (path,) = folder.iterdir()
    path.write_text(content)
    assert forecast(CONFIG) == PEAK and len(asked) == 2
    assert json.loads(path.read_text()) == PEAK


def test_forecast_needs_no_folder_that_can_be_written(asked, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert forecast(CONFIG) == PEAK


def test_forecast_keeps_no_error(folder):
    with pytest.raises(UserError, match="cannot be planned"):
        forecast(OmegaConf.merge(CONFIG, {"lightning": {"trainer": {"precision": "8-bit"}}}))
    assert not folder.exists() or not list(folder.iterdir())


def test_start_forecast_fills_the_cache_from_another_process(asked):
    process = start_forecast(CONFIG)
    assert process is not None and process.wait() == 0
    found = forecast(CONFIG)
    assert not asked and found["weights"] > 1 << 20
    assert start_forecast(CONFIG) is None
