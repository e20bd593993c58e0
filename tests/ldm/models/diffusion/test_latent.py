"""Tests of a latent diffusion model: its stages, its batches, and its trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint import save_state_dict
from ldm.checkpoint.keys import COND_STAGE, CONDITIONER, has_part
from ldm.models.diffusion.conditioning import check_reads_captions
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError
from tests.golden_data import case, fill_seeded, seeded_tensor
from tests.ldm.models.diffusion.conftest import TEXT_TOWER, batch_of, construct

STORED = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}


def test_posterior_gives_a_fresh_latent_each_step(model: LatentDiffusion) -> None:
    encoded = model.encode_batch(batch_of((2, 8, 8, 8)))
    first, second = model.get_first_stage_encoding(encoded), model.get_first_stage_encoding(encoded)
    assert first.shape == (2, 4, 8, 8)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)


def test_stored_latent_is_used_as_it_is(model: LatentDiffusion) -> None:
    batch = batch_of((2, 4, 8, 8))
    latent = model.get_first_stage_encoding(model.encode_batch(batch))
    assert torch.equal(latent, model.scale_factor * batch["f8"].float())


def test_pixels_are_encoded(model: LatentDiffusion) -> None:
    images = seeded_tensor("latent/images", (2, 64, 64, 3), 0.5).clamp(-1, 1)
    encoded = model.encode_batch({"f8": images})
    expected = model.first_stage_model.encode(images.permute(0, 3, 1, 2).contiguous())
    assert torch.equal(encoded.parameters, expected.parameters)


def test_only_the_unet_trains(model: LatentDiffusion) -> None:
    loss, _ = model.shared_step(batch_of((2, 8, 8, 8)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())
    assert all(parameter.grad is None for parameter in model.first_stage_model.parameters())
    assert {id(p) for p in model.trained_parameters()} == {id(p) for p in model.model.parameters()}


def test_frozen_stages_stay_in_evaluation_mode(model: LatentDiffusion) -> None:
    model.train()
    assert model.model.training
    assert not model.first_stage_model.training


def test_text_tower_trains_along() -> None:
    model = construct(TEXT_TOWER, cond_stage_trainable=True, cond_stage_key="txt")
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    model.shared_step(batch)[0].backward()
    tower = model.cond_stage_model.transformer
    assert all(parameter.grad is not None for parameter in tower.parameters())
    assert len(model.trained_parameters()) == len([*model.model.parameters(), *tower.parameters()])
    assert model.cond_stage_model.training


def test_gradients_pass_through_a_frozen_unet() -> None:
    options = {"cond_stage_trainable": True, "cond_stage_key": "txt", "unet_trainable": False, "use_ema": False}
    model = fill_seeded(construct(TEXT_TOWER, **options)).train()
    assert not any(module.training for module in model.model.modules())
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    model.shared_step(batch)[0].backward()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    tower = list(model.cond_stage_model.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in tower) > 0
    assert {id(p) for p in model.trained_parameters()} == {id(p) for p in tower}


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"use_ema": True, "cond_stage_trainable": True}, "use_ema: true averages the UNet.*; set use_ema: false$"),
        ({"use_ema": False}, "unet_trainable: false leaves nothing to train; set cond_stage_trainable: true"),
    ],
)
def test_a_frozen_unet_is_refused(params: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        construct(TEXT_TOWER, unet_trainable=False, **params)


@pytest.mark.parametrize(("part", "names"), [("attn", "attn2."), ("conv_in", "input_blocks.0.0.")])
def test_a_part_of_the_unet_trains(part: str, names: str, tmp_path: Path) -> None:
    model = fill_seeded(construct(STORED, unet_trainable=part, use_ema=True)).train()
    parameters = dict(model.model.named_parameters())
    chosen = {name for name in parameters if names in name}
    model.shared_step(batch_of((2, 8, 8, 8)))[0].backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == chosen != set()
    assert {id(p) for p in model.trained_parameters()} == {id(parameters[name]) for name in chosen}
    everything = set(construct(STORED, unet_trainable="all", use_ema=True).state_dict())
    assert set(model.state_dict()) == everything
    save_state_dict(model.state_dict(), tmp_path / "weights.ckpt")
    model.init_from_ckpt(str(tmp_path / "weights.ckpt"), only_model=True)  # begins the average anew
    assert set(model.state_dict()) == everything


def test_an_unknown_part_of_the_unet_is_refused() -> None:
    with pytest.raises(UserError, match="unet_trainable 'attm' is unknown; valid: true, false, all, attn, conv_in"):
        construct(STORED, unet_trainable="attm")


def test_frozen_text_tower_gets_no_gradient() -> None:
    model = construct(TEXT_TOWER, cond_stage_key="txt")
    batch = {"f8": batch_of((2, 8, 8, 8))["f8"], "txt": ["a cat", "a mouse"]}
    model.shared_step(batch)[0].backward()
    assert all(parameter.grad is None for parameter in model.cond_stage_model.parameters())
    assert not model.cond_stage_model.training


def test_conditioning_schedule_noises_the_conditioning() -> None:
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    model = construct(dummy, num_timesteps_cond=10)
    assert model.cond_ids[:10].tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert (model.cond_ids[10:] == 999).all()
    assert torch.isfinite(model.shared_step(batch_of((2, 4, 8, 8)))[0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"f8": (3, 8, 8)}, "posterior"),
        ({"f8": (8, 9, 8)}, "multiples"),
        ({"t5": (77, 768)}, "context_dim is 64"),
    ],
)
def test_shapes_that_do_not_fit(model: LatentDiffusion, shapes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.check_batch_shapes(shapes)


def test_captions_for_an_unconditional_model_are_refused(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(use_ema=False, conditioning_key=None, cond_stage_config="__is_unconditional__")
    with pytest.raises(UserError, match="has a context_dim of 64, but cond_stage_config: __is_unconditional__"):
        model.check_batch_shapes({"f8": (8, 8, 8), "t5": (77, 64)})


def test_shapes_that_fit(model: LatentDiffusion) -> None:
    model.check_batch_shapes({"f8": (8, 16, 8), "t5": (77, 64)})
    model.check_batch_shapes({"f8": (4, 8, 8)})


def test_scale_from_the_first_batch(make_model: Callable[..., LatentDiffusion]) -> None:
    model = make_model(scale_by_std=True)
    model._trainer = type("Trainer", (), {"global_step": 0})()  # `global_step` is the trainer's
    batch = {**batch_of((2, 4, 8, 8)), "f8": 3 * batch_of((2, 4, 8, 8))["f8"]}
    model.on_train_batch_start(batch, 0)
    assert model.get_first_stage_encoding(model.encode_batch(batch)).std().item() == pytest.approx(1.0, abs=1e-4)
    assert "scale_factor" in model.state_dict()


def test_a_missing_batch_entry_is_named(model: LatentDiffusion) -> None:
    with pytest.raises(UserError, match="'f8', but the data have 'image'"):
        model.shared_step({"image": torch.zeros(2, 64, 64, 3)})


def test_images_without_three_channels_are_images() -> None:
    unet = {**case("unet_sd_tiny")["params"], "in_channels": 1, "out_channels": 1}
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    model = construct(dummy, unet=unet, first_stage_config=identity, channels=1, image_size=16)
    for shape in ((2, 16, 16, 1), (2, 16, 16)):
        batch = {"f8": torch.zeros(shape), "t5": batch_of((2, 8, 8, 8))["t5"]}
        assert model.encode_batch(batch).shape == (2, 1, 16, 16)
        assert torch.isfinite(model.shared_step(batch)[0])


def test_a_narrow_latent_is_no_image(model: LatentDiffusion) -> None:
    assert model.encode_batch({"f8": torch.zeros(2, 4, 8, 3)}).shape == (2, 4, 8, 3)


def test_a_loaded_scale_stays(make_model: Callable[..., LatentDiffusion], tmp_path: Path) -> None:
    save_state_dict(make_model(scale_by_std=True, scale_factor=0.37).state_dict(), tmp_path / "scaled.ckpt")
    model = make_model(scale_by_std=True)
    model.init_from_ckpt(str(tmp_path / "scaled.ckpt"))
    model._trainer = type("Trainer", (), {"global_step": 0})()
    model.on_train_batch_start(batch_of((2, 4, 8, 8)), 0)
    assert model.scale_factor.item() == pytest.approx(0.37)


def test_stored_half_precision_under_bfloat16_autocast(model: LatentDiffusion) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.shared_step(batch_of((2, 8, 8, 8)))
    loss.backward()
    assert torch.isfinite(loss)


def test_keys_of_a_GeneralConditioner_begin_as_those_of_SDXL() -> None:
    def embedder(name: str, key: str, **params: Any) -> dict[str, Any]:
        return {"target": f"ldm.modules.encoders.modules.{name}", "params": params, "input_key": key}

    embedders = [
        {**TEXT_TOWER, "input_key": "txt", "is_trainable": True},
        embedder("ConcatTimestepEmbedderND", "target_size_as_tuple", outdim=4),
    ]
    conditioner = {
        "target": "ldm.modules.encoders.modules.GeneralConditioner",
        "params": {"emb_models": embedders},
    }
    unet = {**case("unet_sd_tiny")["params"], "num_classes": "sequential", "adm_in_channels": 8}
    changes = {"conditioning_key": "crossattn-adm", "cond_stage_key": "txt", "cond_stage_trainable": True}
    model = construct(conditioner, unet=unet, **changes)
    keys = model.state_dict().keys()
    towers = {key for key in keys if key.startswith(CONDITIONER)}
    tower = construct(TEXT_TOWER).cond_stage_model.state_dict().keys()
    assert towers == {f"{CONDITIONER}embedders.0.{key}" for key in tower} and towers
    assert not has_part(keys, COND_STAGE)
    assert model.cond_stage_model is model.conditioner

    batch = {
        "f8": batch_of((2, 8, 8, 8))["f8"],
        "txt": ["a cat", "a mouse"],
        "target_size_as_tuple": torch.tensor([[64, 64], [64, 32]]),
    }
    cond = model.encode_conditioning(batch)
    assert cond["c_crossattn"][0].shape == (2, 77, 64) and cond["c_adm"].shape == (2, 8)
    model.shared_step(batch)[0].backward()
    assert all(parameter.grad is not None for parameter in model.conditioner.parameters())
    assert len(model.trained_parameters()) == len([*model.model.parameters(), *model.conditioner.parameters()])

    check_reads_captions(model)
    model.conditioner._inputs[1] = ["aesthetic_score"]
    with pytest.raises(UserError, match="GeneralConditioner, takes txt, aesthetic_score, which"):
        check_reads_captions(model)

    copied = deepcopy(model).double()
    assert copied.cond_stage_model is copied.conditioner is not model.conditioner
    assert next(copied.cond_stage_model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("cond_stage", [TEXT_TOWER, "__is_first_stage__"])
def test_keys_of_other_cond_stages_begin_with_cond_stage_model(cond_stage: dict | str) -> None:
    keys = construct(cond_stage, cond_stage_key="image").state_dict().keys()
    assert has_part(keys, COND_STAGE) and not has_part(keys, CONDITIONER)
