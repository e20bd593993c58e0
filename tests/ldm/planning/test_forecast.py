"""Tests of cached forecasts, and of forecasts made in a separate process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.planning import forecast as module
from ldm.planning import step
from ldm.planning.forecast import forecast, start_forecast
from ldm.util import UserError
from tests import training_runs
from tests.waiting import LIMIT

CONFIG = OmegaConf.create(training_runs.CONFIG)
PEAK = {"weights": 3, "activations": 4}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "latent-finetune" / "forecasts"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Replace `peak_of_step` by a function that records its batch sizes; return the record."""
    sizes: list[int | None] = []

    def peak_of_step(config, images):
        sizes.append(images)
        return PEAK

    monkeypatch.setattr(step, "peak_of_step", peak_of_step)
    return sizes


def test_forecast_is_made_once_per_config_batch_and_version(calls, monkeypatch):
    assert forecast(CONFIG) == forecast(CONFIG) == PEAK and calls == [None]
    forecast(CONFIG, 2)
    forecast(OmegaConf.merge(CONFIG, {"model": {"params": {"use_ema": False}}}))
    assert calls == [None, 2, None]
    monkeypatch.setattr(module.metadata, "version", lambda name: "new")
    forecast(CONFIG)
    assert len(calls) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weights": "3"}'])
def test_forecast_replaces_a_damaged_file(calls, folder, content):
    forecast(CONFIG)
    (path,) = folder.iterdir()
    path.write_text(content)
    assert forecast(CONFIG) == PEAK and len(calls) == 2
    assert json.loads(path.read_text()) == PEAK


def test_forecast_works_without_a_writable_folder(calls, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert forecast(CONFIG) == PEAK


def test_forecast_does_not_cache_errors(folder):
    with pytest.raises(UserError, match="cannot be predicted"):
        forecast(OmegaConf.merge(CONFIG, {"lightning": {"trainer": {"precision": "8-bit"}}}))
    assert not folder.exists() or not list(folder.iterdir())


def test_start_forecast_fills_the_cache_from_another_process(calls):
    process = start_forecast(CONFIG)
    assert process is not None and process.wait(LIMIT) == 0
    found = forecast(CONFIG)
    assert not calls and found["weights"] > 1 << 18
    assert start_forecast(CONFIG) is None
