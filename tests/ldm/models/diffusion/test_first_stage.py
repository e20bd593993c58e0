"""Tests of the first stage's device while a latent diffusion model trains."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion import first_stage
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.golden_data import seeded_tensor
from tests.ldm.models.diffusion.conftest import batch_of

# Nothing is moved, so the CPU can stand for a GPU.
HOST, DEVICE = torch.device("meta"), torch.device("cpu")


def first_stage_moves(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Record the devices that the first stage is moved to, without moving it."""
    places = [DEVICE]
    monkeypatch.setattr(first_stage, "_HOST", HOST)
    monkeypatch.setattr(first_stage, "_device", lambda module: places[-1])
    model.first_stage_model.to = places.append
    return places


def test_the_first_stage_leaves_the_device_except_for_images(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = first_stage_moves(model, monkeypatch)
    batch = batch_of((2, 8, 8, 8))
    for batch_idx in range(2):
        model.on_train_batch_start(batch, batch_idx)
        model.shared_step(batch)
    assert places == [DEVICE, HOST]
    assert model.log_images(batch, ddim_steps=2)["samples"].shape == (2, 3, 64, 64)
    assert places == [DEVICE, HOST, DEVICE, HOST]


def test_the_first_stage_stays_for_training_on_images(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    places = first_stage_moves(model, monkeypatch)
    batch = {**batch_of((2, 8, 8, 8)), "f8": seeded_tensor("latent/images", (2, 64, 64, 3), 0.5).clamp(-1, 1)}
    model.on_train_batch_start(batch, 0)
    model.shared_step(batch)
    model.log_images(batch, ddim_steps=2, plot_denoise_rows=False)
    assert places == [DEVICE]
