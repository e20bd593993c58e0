"""Tests of the warning before a training that does not fit."""

from __future__ import annotations

import logging

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from ldm.config.load import build_model, load_config
from ldm.planning import warning as start
from ldm.planning.card import GIB, needed_bytes

BASE = load_config(["finetune_stable_diffusion.yaml"])  # batch 4


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Fake steps of 10 GiB plus 1 GiB per image; 3 GiB plus 1 if the optimizer steps in backward.

    Streamed weights are on the host: 15 GiB, or 3.
    """

    def forecast(config, images=None):
        params = config.model.params
        lean = params.get("optimizer_config", {}).get("target") == "ldm.optim.InBackward"
        weights = (3 if lean else 10) * GIB
        on_host = params.unet_config.target.endswith("StreamedUNetModel")
        activations = (images or config.data.params.batch_size) * GIB
        if on_host:
            return {"weights": 0, "activations": activations, "host": (3 if lean else 15) * GIB}
        return {"weights": weights, "activations": activations}

    monkeypatch.setattr(start, "forecast", forecast)
    monkeypatch.setattr(start, "tiers", lambda: ["lean.yaml", "minimal.yaml", "smallest.yaml"])
    caplog.set_level(logging.INFO)
    return caplog


def test_a_step_that_fits_is_logged_without_a_warning(planned: pytest.LogCaptureFixture) -> None:
    assert start.compare(BASE, needed_bytes(14 * GIB))[0] == needed_bytes(14 * GIB)
    assert "predicted to need 15.0 GiB of the GPU; 15.0 GiB are free" in planned.text
    assert not [record for record in planned.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (
            13,
            "data.params.batch_size=1 would need 11.9 GiB; --accumulate_grad_batches 4 keeps the number",
        ),
        (8, "--base ... lean.yaml, batch 1, would need 4.7 GiB; --accumulate_grad_batches 4 keeps"),
        (2, "--base ... minimal.yaml, batch 1, would need 1.6 GiB; --accumulate_grad_batches 4 keeps"),
        (1, "nothing fits"),
    ],
)
def test_a_step_that_does_not_fit_gives_a_warning_with_advice(
    planned: pytest.LogCaptureFixture, free: int, advice: str
) -> None:
    start.compare(BASE, free * GIB)
    (record,) = [record for record in planned.records if record.levelno == logging.WARNING and "ldm" in record.name]
    assert f"15.0 GiB needed, {free}.0 GiB free; {advice}" in record.getMessage()


@pytest.mark.parametrize(("ram", "tier"), [(17, "minimal.yaml"), (16, "smallest.yaml"), (4, None)])
def test_a_tier_needs_host_memory_too(planned: pytest.LogCaptureFixture, ram: int, tier: str | None) -> None:
    start.compare(BASE, 2 * GIB, ram * GIB)
    advice = f"--base ... {tier}, batch 1, would need" if tier else "nothing fits"
    assert f"15.0 GiB needed, 2.0 GiB free; {advice}" in planned.text


def test_a_step_that_does_not_fit_the_host_gives_a_warning(
    planned: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "tiers", lambda: ["smallest.yaml"])  # lean.yaml cannot be merged over minimal.yaml
    start.compare(load_config(["finetune_stable_diffusion.yaml", "minimal.yaml"]), 4 * GIB, 16 * GIB)
    expected = (
        "16.5 GiB of host memory needed, 16.0 GiB installed; --base ... smallest.yaml, batch 1, would need 1.6 GiB"
    )
    assert expected in planned.text


def test_the_installed_memory_is_that_of_the_machine() -> None:
    psutil = pytest.importorskip("psutil")
    assert start._installed_memory() == pytest.approx(psutil.virtual_memory().total, rel=0.01)


@pytest.mark.parametrize("names", [["lean.yaml"], ["decay_to_start.yaml"], ["minimal.yaml"], ["fast.yaml"]])
def test_tiers_are_merged_over_every_config(
    names: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are built, so that a tier that cannot be merged over a config is found."""

    def forecast(config, images=None):
        with torch.device("meta"):
            build_model(config)
        return {"weights": 10 * GIB}

    monkeypatch.setattr(start, "forecast", forecast)
    start.compare(load_config(["demo_tiny.yaml", *names]), GIB)
    assert "10.9 GiB needed, 1.0 GiB free; nothing fits" in caplog.text


def test_only_cuda_devices_are_checked(planned: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    start.warn_if_too_large(BASE, SingleDeviceStrategy("cpu"))
    assert not planned.records
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    start.warn_if_too_large(BASE, SingleDeviceStrategy("cuda:0"))
    assert "80.0 GiB are free" in planned.text


def test_a_failed_forecast_does_not_stop_a_run(
    planned: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(start, "forecast", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, GIB))
    start.warn_if_too_large(BASE, SingleDeviceStrategy("cuda:0"))
    assert "cannot be predicted (no such kernel)" in planned.text
