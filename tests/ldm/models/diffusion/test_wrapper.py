"""Tests of the conditioning that the UNet gets."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.util import UserError
from tests.golden_data import case, seeded_tensor
from tests.ldm.models.diffusion.conftest import TEXT_TOWER, batch_of, construct


@pytest.mark.parametrize(
    ("key", "changes", "cond"),
    [
        (None, {}, None),
        ("concat", {"in_channels": 6}, (2, 2, 8, 8)),
        ("adm", {"num_classes": 5}, "labels"),
    ],
)
def test_other_conditionings(key: str | None, changes: dict, cond: object) -> None:
    unet = {
        **case("unet_attention_block")["params"],
        "in_channels": 4,
        "out_channels": 4,
        "num_classes": None,
    } | changes
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "c"}}
    model = construct("__is_unconditional__" if key is None else dummy, unet=unet, conditioning_key=key)
    batch = {"f8": batch_of((2, 4, 8, 8))["f8"]}
    if cond == "labels":
        batch["c"] = torch.tensor([1, 4])
    elif cond is not None:
        batch["c"] = seeded_tensor("latent/map", cond)
    loss, _ = model.shared_step(batch)
    loss.backward()
    assert torch.isfinite(loss)


def test_hybrid_concatenates_and_attends() -> None:
    unet = {**case("unet_sd_tiny")["params"], "in_channels": 5}
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    model = construct(dummy, unet=unet, conditioning_key="hybrid", concat_keys=["mask"])
    batch = {**batch_of((2, 4, 8, 8)), "mask": torch.ones(2, 1, 8, 8)}
    cond = model.encode_conditioning(batch)
    assert [part.shape for part in cond["c_concat"]] == [(2, 1, 8, 8)]
    assert torch.isfinite(model.shared_step(batch)[0])


def test_concatenated_maps_come_after_the_input() -> None:
    unet = {"target": "torch.nn.Identity"}
    wrapper = DiffusionWrapper(unet, "concat")
    wrapper.diffusion_model.forward = lambda x, t: x
    x, extra = torch.zeros(1, 4, 2, 2), torch.ones(1, 2, 2, 2)
    assert wrapper(x, torch.tensor([1]), c_concat=[extra])[0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]


def test_hybrid_needs_maps() -> None:
    with pytest.raises(UserError, match="concat_keys"):
        construct(TEXT_TOWER, conditioning_key="hybrid").concatenated({})


@pytest.mark.parametrize(("key", "channels"), [("crossattn-adm", 4), ("hybrid-adm", 6)])
def test_vectors_reach_the_unet_as_y(key: str, channels: int) -> None:
    wrapper = DiffusionWrapper({"target": "torch.nn.Identity", "sequential_crossattn": False}, key)
    seen: dict = {}
    wrapper.diffusion_model.forward = lambda x, t, **given: seen.update(given) or x
    x, vector, context = torch.zeros(2, 4, 2, 2), torch.ones(2, 5), torch.ones(2, 3, 8)
    maps = {"c_concat": [torch.ones(2, 2, 2, 2)]} if key == "hybrid-adm" else {}
    out = wrapper(x, torch.tensor([1, 2]), c_crossattn=[context, context], c_adm=vector, **maps)
    assert out.shape[1] == channels
    assert seen["y"] is vector and seen["context"].shape == (2, 6, 8)
    with pytest.raises(UserError, match=f"conditioning_key '{key}' needs c_adm, but the conditioning has none"):
        wrapper(x, torch.tensor([1, 2]), c_crossattn=[context], **maps)


@pytest.mark.parametrize("shape", [(2, 77, 8), (2, 2, 4, 4)])
def test_captions_and_maps_of_another_size_are_no_maps(shape: tuple[int, ...]) -> None:
    wrapper = DiffusionWrapper({"target": "torch.nn.Identity"}, "concat")
    with pytest.raises(UserError, match=r"'concat' needs maps of the input's size \(2, 2\), but .*: crossattn"):
        wrapper(torch.zeros(2, 4, 2, 2), torch.tensor([1, 2]), c_concat=[torch.zeros(shape)])


def test_sequential_crossattn_is_refused() -> None:
    with pytest.raises(UserError, match="sequential_crossattn: true is not supported"):
        DiffusionWrapper({"target": "torch.nn.Identity", "sequential_crossattn": True}, "crossattn")


def test_parts_of_a_general_conditioner_are_placed() -> None:
    """Its vector becomes `c_adm`, its crossattn `c_crossattn`, for training and for a caption."""
    unet = {**case("unet_sd_tiny")["params"], "num_classes": "sequential", "adm_in_channels": 5}
    model = construct(TEXT_TOWER, unet=unet, cond_stage_key="txt", conditioning_key="crossattn-adm")
    parts = {"crossattn": torch.ones(2, 7, 64).half(), "vector": torch.ones(2, 5).half()}
    model.cond_stage_model.encode = lambda captions: parts
    for cond in (model.encode_conditioning({"txt": ["a", "b"]}), model.get_unconditional_conditioning(2)):
        assert set(cond) == {"c_crossattn", "c_adm"}
        assert cond["c_crossattn"][0].shape == (2, 7, 64) and cond["c_adm"].shape == (2, 5)
    assert model.encode_conditioning({"txt": ["a", "b"]})["c_adm"].dtype == torch.float32


def with_sizes(context: int = 64, unet: dict | None = None) -> DiffusionWrapper:
    params = {**case("unet_sd_tiny")["params"], "in_channels": 5, "context_dim": context, **(unet or {})}
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return DiffusionWrapper({"target": target, "params": params}, "hybrid")


@pytest.mark.parametrize(
    ("size", "channels", "features", "message"),
    [
        (16, 1, 64, r"maps of the input's size \(8, 8\), but .* shape \(1, 1, 16, 16\)"),
        (8, 2, 64, r"in_channels 5, but the latent has 4 channels and the maps .* \(2, 8, 8\); give their sum"),
        (8, 1, 32, "context_dim 64, but the cond stage gives 32 features per token"),
    ],
)
def test_conditionings_of_other_sizes_are_named(size: int, channels: int, features: int, message: str) -> None:
    x, extra, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, channels, size, size), torch.zeros(1, 7, features)
    with pytest.raises(UserError, match=message):
        with_sizes()(x, torch.tensor([1]), c_concat=[extra], c_crossattn=[context])


def test_a_context_that_the_unet_ignores_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with_sizes()
    assert not caplog.records
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {**case("unet_attention_block")["params"], "num_classes": None}}  # fmt: skip
    DiffusionWrapper(unet, "crossattn")
    assert "conditioning_key crossattn: the UNet ignores the cond stage; set use_spatial_transformer" in caplog.text
