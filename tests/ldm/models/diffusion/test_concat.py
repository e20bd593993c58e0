"""Models that see maps beside the noisy latent: masks, depth, low-resolution images, edits, layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.models.diffusion.ddpm import LatentUpscaleDiffusion, Layout2ImgDiffusion
from ldm.models.diffusion.initial_weights import FIRST_CONVOLUTION_KEYS
from ldm.util import UserError
from tests.golden_data import case, seeded_tensor
from tests.ldm.models.diffusion.conftest import TEXT_TOWER, construct
from tests.ldm.models.diffusion.golden_v2 import build_v2, without_noise

FIRST = "diffusion_model.input_blocks.0.0.weight"


def stored(name: str, shape: tuple[int, ...]) -> Tensor:
    return seeded_tensor(f"concat/{name}", shape).half()


def test_inpainting_takes_stored_masks_and_posteriors() -> None:
    """A mask at the latent's size stays as it is; the masked image's posterior is sampled and scaled."""
    model = build_v2("inpaint_input", first_stage_key="f8", cond_stage_key="t5").eval()
    mask, posterior = (stored("mask", (2, 1, 8, 8)) > 0).half(), stored("masked", (2, 8, 8, 8))
    posterior[:, 4:] = -30
    batch = {"f8": stored("f8", (2, 8, 8, 8)), "t5": stored("t5", (2, 7, 64)), "mask": mask, "masked_image": posterior}
    found_mask, latent = model.encode_conditioning(batch)["c_concat"]
    assert torch.equal(found_mask, mask.float())
    torch.testing.assert_close(latent, 0.18215 * posterior[:, :4].float(), atol=1e-6, rtol=1e-4)
    assert torch.isfinite(model.train().shared_step(batch)[0])


def test_inpainting_without_its_masked_image() -> None:
    with pytest.raises(UserError, match="masked_image_key 'hole' is not one of concat_keys: mask, masked_image"):
        build_v2("inpaint_input", masked_image_key="hole")


def test_another_order_of_the_inputs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    build_v2("inpaint_input")
    assert not caplog.messages
    build_v2("inpaint_input", concat_keys=["masked_image", "mask"])
    assert caplog.messages == [
        "concat_keys masked_image, mask: released inpainting models take the mask first, then masked_image; "
        "their weights fit only that"
    ]


@pytest.mark.parametrize("use_ema", [False, True])
def test_finetune_keys_start_new_channels_at_zero(use_ema: bool, tmp_path: Path) -> None:
    """The weights of a model of 4 channels go into one of 9, whose prediction is then the same."""
    source = build_v2("zero_snr", use_ema=use_ema)
    assert case("zero_snr")["unet"]["in_channels"] == 4
    save_state_dict(source.state_dict(), tmp_path / "release.safetensors")
    params = {"ckpt_path": str(tmp_path / "release.safetensors"), "use_ema": use_ema}
    with pytest.raises(UserError, match=FIRST):
        build_v2("inpaint_input", filled=False, **params, finetune_keys=None)
    model = build_v2("inpaint_input", filled=False, **params, finetune_keys=FIRST_CONVOLUTION_KEYS).eval()
    assert not model.model.get_parameter(FIRST)[:, 4:].any()
    x, t, context = stored("x", (2, 4, 8, 8)).float(), torch.tensor([3, 900]), stored("c", (2, 7, 64)).float()
    maps = stored("maps", (2, 5, 8, 8)).float()
    expected = source.eval().apply_model(x, t, context)
    torch.testing.assert_close(model.apply_model(x, t, {"c_concat": [maps], "c_crossattn": [context]}), expected)
    if use_ema:
        average, expected = (m.model_ema.get_buffer(FIRST.replace(".", "")) for m in (model, source))
        assert torch.equal(average[:, :4], expected) and not average[:, 4:].any()


def test_depth_goes_through_the_depth_stage_and_stays_frozen() -> None:
    stage = {"target": "torch.nn.Conv2d", "params": {"in_channels": 3, "out_channels": 1, "kernel_size": 1}}
    model = build_v2("depth_input", depth_stage_config=stage).train()
    assert not model.depth_model.training
    assert all(not parameter.requires_grad for parameter in model.depth_model.parameters())
    image = stored("image", (2, 3, 64, 64)).float()
    depth = model.depth(image, (8, 8))
    torch.testing.assert_close(depth, model.depth(model.depth_model(image), (8, 8)))
    low, high = depth.flatten(1).min(1).values, depth.flatten(1).max(1).values
    torch.testing.assert_close(low, torch.full((2,), -1.0))
    assert ((high > 0.97) & (high < 1)).all()
    half = model.bfloat16().depth(image, (8, 8))  # the weights of the lean tier, and a batch that stays float32
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, depth, rtol=0, atol=0.05)


def upscaler(**changes: Any) -> LatentUpscaleDiffusion:
    low = {key: case("loss_upscale")["low_scale"][key] for key in ("target", "params")}
    target = "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion"
    return build_v2("loss_upscale", target, low_scale_config=low, low_scale_key="lr", **changes)


def test_upscaling_conditions_on_the_level_of_noise() -> None:
    model = upscaler(noise_level_key="level")
    assert "low_scale_model.betas" in model.state_dict()
    batch = {
        "f8": stored("f8", (2, 4, 8, 8)), "t5": stored("t5", (2, 7, 64)),
        "lr": stored("lr", (2, 8, 8, 3)), "level": torch.tensor([0, 349]),
    }  # fmt: skip
    cond = model.encode_conditioning(batch)
    assert cond["c_adm"].tolist() == [0, 349] and cond["c_concat"][0].shape == (2, 3, 8, 8)
    clean = batch["lr"].permute(0, 3, 1, 2).float()
    near, far = (cond["c_concat"][0] - clean).flatten(1).norm(dim=1)
    assert near < far / 5
    assert torch.isfinite(model.shared_step(batch)[0])
    sampled = upscaler().encode_conditioning(batch)["c_adm"]
    assert ((sampled >= 0) & (sampled < 350)).all()


def test_layout_reads_boxes_alone() -> None:
    with pytest.raises(UserError, match="'caption': must be 'coordinates_bbox'"):
        Layout2ImgDiffusion(cond_stage_key="caption")


def test_layout_is_conditioned_on_tokens() -> None:
    model = build_v2(
        "zero_snr",
        "ldm.models.diffusion.ddpm.Layout2ImgDiffusion",
        cond_stage_key="coordinates_bbox",
        cond_stage_config={"target": "torch.nn.Embedding", "params": {"num_embeddings": 20, "embedding_dim": 64}},
    )
    batch = {"f8": stored("f8", (2, 4, 8, 8)), "coordinates_bbox": torch.randint(20, (2, 11))}
    assert model.encode_conditioning(batch).shape == (2, 11, 64)
    assert torch.isfinite(model.shared_step(batch)[0])


def test_edits_of_stored_pairs() -> None:
    """The original's latent is the mode and not scaled; the data drop stored captions, so that all stay here."""
    dummy = {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}}
    model = build_v2(
        "ip2p_input", cond_stage_config=dummy, first_stage_key="f8", concat_keys=["original"], dropout=0.0,
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                     "params": {**case("ip2p_input")["unet"], "context_dim": 64}},
    )  # fmt: skip
    batch = {name: stored(name, (2, 8, 8, 8)) for name in ("f8", "original")} | {"t5": stored("t5", (2, 7, 64))}
    cond = model.encode_conditioning(batch)
    assert torch.equal(cond["c_concat"][0], batch["original"][:, :4].float())
    assert torch.equal(cond["c_crossattn"][0], batch["t5"].float())
    assert torch.isfinite(model.shared_step(batch)[0])


@pytest.mark.slow
def test_edits_of_images_train() -> None:
    model = without_noise(build_v2("ip2p_input"))
    images = stored("image", (2, 3, 64, 64)).float().clamp(-1, 1)
    batch = {"edited": images, "edit": {"c_concat": images, "c_crossattn": ["make it snow", "a cat"]}}
    loss, _ = model.shared_step(batch)
    loss.backward()
    assert torch.isfinite(loss)
    images = model.log_images(batch, N=2, ddim_steps=2, unconditional_guidance_scale=3.0)
    assert images["samples_cfg_scale_3.00"].shape == images["inputs"].shape == (2, 3, 64, 64)


def test_a_caption_beside_maps_keeps_them() -> None:
    model = construct(
        TEXT_TOWER, unet={**case("unet_sd_tiny")["params"], "in_channels": 5}, conditioning_key="hybrid",
        concat_keys=["mask"], cond_stage_key="txt",
    )  # fmt: skip
    cond = model.encode_conditioning({"mask": torch.ones(2, 1, 8, 8), "txt": ["a", "b"]})
    uncond = model.get_unconditional_conditioning(2, ["c", "d"], cond)
    assert uncond["c_concat"] is cond["c_concat"]
    assert torch.equal(uncond["c_crossattn"][0], model.get_learned_conditioning(["c", "d"]))
