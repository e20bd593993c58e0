"""The weights that a model starts from, where they do not fit as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import save_state_dict
from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.golden_data import case

ModelFactory = Callable[..., LatentDiffusion]
OUT = "diffusion_model.out.2.weight"


@pytest.fixture
def averaged(make_model: ModelFactory, tmp_path: Path) -> tuple[LatentDiffusion, str]:
    """Return a model in training, whose average differs from its weights, and its file."""
    model = make_model(use_ema=True)
    model.model_ema.num_updates.fill_(7)
    save_state_dict(model.state_dict(), tmp_path / "trained.safetensors")
    return model, str(tmp_path / "trained.safetensors")


@pytest.mark.parametrize("keys", [{"load_ema": False}, {"reset_ema": True}])
def test_load_ema_false_begins_the_average_anew(make_model: ModelFactory, averaged: tuple, keys: dict) -> None:
    source, path = averaged
    model = make_model(use_ema=True, **keys)
    model.init_from_ckpt(path)
    average = model.model_ema.get_buffer(OUT.replace(".", ""))
    assert torch.equal(average, source.model.get_parameter(OUT))
    assert model.model_ema.num_updates == 0


@pytest.mark.parametrize(("keys", "updates"), [({}, 7), ({"reset_num_ema_updates": True}, 0)])
def test_reset_num_ema_updates_keeps_the_average(
    make_model: ModelFactory, averaged: tuple, keys: dict, updates: int
) -> None:
    source, path = averaged
    model = make_model(use_ema=True, **keys)
    model.init_from_ckpt(path)
    name = OUT.replace(".", "")
    assert torch.equal(model.model_ema.get_buffer(name), source.model_ema.get_buffer(name))
    assert model.model_ema.num_updates == updates


@pytest.mark.slow
def test_make_it_fit_keeps_the_sums_over_inputs(make_model: ModelFactory, tmp_path: Path) -> None:
    """A context of twice the width, with the values twice, means the same."""
    source = make_model()
    save_state_dict(source.state_dict(), tmp_path / "narrow.safetensors")
    wide = make_model(unet={**case("unet_sd_tiny")["params"], "context_dim": 128}, make_it_fit=True)
    wide.init_from_ckpt(str(tmp_path / "narrow.safetensors"))
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), torch.randn(2, 7, 64)
    with torch.no_grad():
        expected = source.apply_model(x, t, context)
        torch.testing.assert_close(wide.apply_model(x, t, torch.cat([context, context], dim=-1)), expected,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
