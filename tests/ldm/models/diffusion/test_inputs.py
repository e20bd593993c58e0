"""Inputs of sampling in the latent space: the maps that models of each kind see, and what each kind refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint import load_state_dict, save_state_dict
from ldm.models.diffusion.inputs import Inputs, encode_inputs, image_scale_of
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.release.load import load_release
from ldm.util import UserError
from tests.golden_data import case, seeded_tensor
from tests.ldm.models.diffusion.golden_v2 import build_v2
from tests.tiny_families import write_tiny

SHAPE = (4, 8, 8)
IMAGE = seeded_tensor("inputs/image", (3, 64, 64), 0.5).clamp(-1, 1)
OTHER = seeded_tensor("inputs/other", (3, 64, 64), 0.5).clamp(-1, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LatentDiffusion]:
    folder, models = tmp_path_factory.mktemp("tiny"), {}

    def model_of(key: str) -> LatentDiffusion:
        if key not in models:
            models[key] = load_release(*write_tiny(key, folder))
        return models[key]

    return model_of


def mode(model: LatentDiffusion, image: Tensor) -> Tensor:
    return model.encode_first_stage(image[None]).mode()


def mask_of(*box: int) -> Tensor:
    top, left, bottom, right = box
    mask = torch.zeros(1, 64, 64)
    mask[:, top:bottom, left:right] = 1
    return mask


def test_init_is_the_scaled_mode(tiny: Callable) -> None:
    model = tiny("sd1")
    encoded = encode_inputs(model, Inputs(init=IMAGE), SHAPE)
    torch.testing.assert_close(encoded.init, 0.18215 * mode(model, IMAGE))
    assert encoded.maps == [] and encoded.keep is None


def test_a_cell_with_a_pixel_to_repaint_is_repainted(tiny: Callable) -> None:
    """Pixels 15 to 16 touch two cells of eight; the faintest half of a mask counts as none."""
    model, mask = tiny("sd1"), mask_of(15, 0, 17, 1) + 0.4 * mask_of(40, 40, 48, 48)
    encoded = encode_inputs(model, Inputs(image=IMAGE, mask=mask), SHAPE)
    repainted = (1 - encoded.keep)[0, 0]
    assert repainted.nonzero().tolist() == [[1, 0], [2, 0]]
    torch.testing.assert_close(encoded.kept, 0.18215 * mode(model, IMAGE))
    samples = torch.ones(2, *SHAPE)
    replaced = encoded.with_kept(samples)
    assert (replaced[:, :, 1, 0] == 1).all()
    assert torch.equal(replaced[1, :, 3:], encoded.kept[0, :, 3:])


@pytest.mark.parametrize(("key", "scale"), [("sd1_inpainting", 0.18215), ("sdxl_inpainting", 0.13025)])
def test_inpainting_models_see_the_mask_and_the_image_without_its_pixels(
    tiny: Callable, key: str, scale: float
) -> None:
    model, mask = tiny(key), mask_of(16, 0, 64, 64)
    encoded = encode_inputs(model, Inputs(image=IMAGE, mask=mask), SHAPE)
    cells, masked = encoded.maps
    assert torch.equal(cells, F.max_pool2d(mask[None], 8))
    torch.testing.assert_close(masked, scale * mode(model, IMAGE * (1 - mask)))
    changed = torch.where(mask > 0, OTHER, IMAGE)
    assert torch.equal(encode_inputs(model, Inputs(image=changed, mask=mask), SHAPE).maps[1], masked)
    assert encoded.keep is None


def test_editing_models_see_the_unscaled_mode(tiny: Callable) -> None:
    model = tiny("instruct_pix2pix")
    [latent] = encode_inputs(model, Inputs(image=IMAGE), SHAPE).maps
    torch.testing.assert_close(latent, mode(model, IMAGE))
    assert (image_scale_of(model, None), image_scale_of(model, 2.0)) == (1.5, 2.0)
    assert image_scale_of(tiny("sd1"), None) is None
    with pytest.raises(UserError, match=r"--image-scale 1\.5: this model does not edit images"):
        image_scale_of(tiny("sd1"), 1.5)


def test_depth_models_see_the_given_or_the_estimated_depth(tiny: Callable) -> None:
    """A given map is spread over [-1, 1]; the network's is that of the image at 384 pixels, or of the one to begin."""
    model = tiny("sd2_depth")
    ramp = torch.linspace(0, 5, 64).expand(1, 64, 64)
    [depth] = encode_inputs(model, Inputs(depth=ramp, image=IMAGE), SHAPE).maps
    assert depth.shape == (1, 1, 8, 8)
    assert depth.min() == -1 and depth.max().item() == pytest.approx(1, abs=1e-3)
    assert (depth.diff(dim=-1) > 0).all()
    [estimated] = encode_inputs(model, Inputs(image=IMAGE), SHAPE).maps
    resized = F.interpolate(IMAGE[None], (384, 384), mode="bicubic", antialias=True)
    weighted = (model.depth_model.weight[0] * resized[0]).sum(0)[None, None]
    torch.testing.assert_close(estimated, model.depth(weighted, (8, 8)), atol=1e-4, rtol=1e-4)
    [of_init] = encode_inputs(model, Inputs(init=IMAGE), SHAPE).maps
    assert torch.equal(of_init, estimated)
    with pytest.raises(UserError, match=r"needs a depth map; give --depth, .*, or --image, whose depth is estimated"):
        encode_inputs(model, Inputs(), SHAPE)


def test_a_depth_model_without_its_network_needs_a_map(tmp_path: Path) -> None:
    release, config = write_tiny("sd2_depth", tmp_path)
    weights = load_state_dict(release)
    without = {key: value for key, value in weights.items() if not key.startswith("depth_model.")}
    save_state_dict(without, tmp_path / "without.safetensors")
    model = load_release(tmp_path / "without.safetensors", config)
    assert encode_inputs(model, Inputs(depth=torch.rand(1, 64, 64)), SHAPE).maps
    with pytest.raises(UserError, match=r"needs a depth map; give --depth, a \.npy or an image .* lighter$"):
        encode_inputs(model, Inputs(image=IMAGE), SHAPE)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("sd1", {"image": IMAGE}, "--image: this model repaints only under a mask; give --mask too"),
        ("sd1", {"depth": IMAGE[:1]}, "--depth: this model does not use a depth map"),
        ("sd1", {"mask": IMAGE[:1]}, "--mask: give --image too"),
        ("sd1_inpainting", {}, "this model repaints a part of an image; give --image and --mask"),
        ("sdxl_inpainting", {"image": IMAGE}, "give --image and --mask"),
        ("instruct_pix2pix", {}, "this model edits an image; give --image"),
    ],
)
def test_what_a_model_cannot_take(tiny: Callable, key: str, given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_inputs(tiny(key), Inputs(**given), SHAPE)


def test_an_upscaler_is_refused() -> None:
    low = {key: case("loss_upscale")["low_scale"][key] for key in ("target", "params")}
    target = "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion"
    model = build_v2("loss_upscale", target=target, filled=False, low_scale_config=low)
    with pytest.raises(UserError, match="this is an upscaler, which txt2img does not sample from"):
        encode_inputs(model, Inputs(), SHAPE)


def test_not_finite_encodings_are_told(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("sd1")
    monkeypatch.setattr(model, "encode_first_stage", lambda x: torch.full((1, *SHAPE), float("nan")))
    with pytest.raises(UserError, match=r"the autoencoder encodes an image to NaN .*--precision fp32 or bf16"):
        encode_inputs(model, Inputs(init=IMAGE), SHAPE)


def test_pasted_keeps_what_the_mask_leaves() -> None:
    mask = mask_of(0, 0, 32, 64) + 0.25 * mask_of(32, 0, 33, 64)
    pasted = Inputs(image=IMAGE, mask=mask).pasted(3 * OTHER)
    assert torch.equal(pasted[:, 33:], IMAGE[:, 33:])
    assert torch.equal(pasted[:, :32], (3 * OTHER).clamp(-1, 1)[:, :32])
    torch.testing.assert_close(pasted[:, 32], 0.25 * (3 * OTHER).clamp(-1, 1)[:, 32] + 0.75 * IMAGE[:, 32])
    assert Inputs().pasted(OTHER) is OTHER
