"""txt2img with images, masks, depth maps and sizes, on tiny models of the families."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.prompts import PromptConditioning
from ldm.release.load import load_release
from tests.conftest import RELEASE_CONFIG, ROOT
from tests.tiny_families import SIDE, write_tiny

TXT2IMG = ROOT / "tools" / "txt2img.py"
EMOJI = ROOT / "data"
TRAINED = EMOJI / "base" / "emoji.safetensors", RELEASE_CONFIG
Draw = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Return a function that writes a tiny release of a family once, with its config."""
    folder, written = tmp_path_factory.mktemp("families"), {}

    def files(key: str) -> tuple[Path, Path]:
        if key not in written:
            written[key] = write_tiny(key, folder)
        return written[key]

    return files


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with an image of the models' size, one of another size, a mask of all rows from 16, and more."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (SIDE // 4, SIDE // 4, 3), np.uint8)
    Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save("image.png")
    Image.fromarray(noise).resize((96, 128)).save("large.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    Image.fromarray(mask).save("black.png")
    mask[16:] = 255
    Image.fromarray(mask).save("mask.png")
    np.save("depth.npy", np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE))
    Path("prompts.txt").write_text("red apple\na dog\n")
    return tmp_path


@pytest.fixture
def draw(work: Path, run_tool: Callable) -> Draw:
    """Samples with a command line; returns the new images in their order."""

    def call(files: tuple[Path, Path], *arguments: object, steps: int = 2) -> list[np.ndarray]:
        release, config = files
        before = set(work.glob("out/0*.png"))
        common = ("--ckpt", release, "--config", config, "--steps", steps, "--out", "out")
        assert run_tool(TXT2IMG, *common, *arguments) is None
        paths = sorted(set(work.glob("out/0*.png")) - before)
        return [np.asarray(Image.open(path)).astype(int) for path in paths]

    return call


def pixels(name: str | Path) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB")).astype(int)


def last_settings(work: Path) -> dict[str, Any]:
    with Image.open(max(work.glob("out/0*.png"))) as image:
        return json.loads(image.text["parameters"])


def test_each_family_makes_images_of_its_size_from_prompts(tiny: Callable, draw: Draw, work: Path) -> None:
    for key in ("sd1", "sd2_base", "sd2_768_v", "sdxl"):
        [image] = draw(tiny(key), "--prompt", "red apple")
        assert image.shape == (SIDE, SIDE, 3) and image.std() > 0
        assert (last_settings(work)["H"], last_settings(work)["W"]) == (SIDE, SIDE)
        assert last_settings(work)["parameterization"] == ("v" if key == "sd2_768_v" else "eps")
    assert last_settings(work)["original_size"] == [SIDE, SIDE]


def test_a_seed_is_an_image_whatever_the_batch(tiny: Callable, draw: Draw) -> None:
    """With images and masks too, in each kind of model; and images of two prompts from a file."""
    painted = ("--image", "image.png", "--mask", "mask.png")
    for key, given in (("sd1", painted), ("sdxl_inpainting", painted), ("instruct_pix2pix", painted[:2])):
        arguments = ("--from-file", "prompts.txt", "--n", 2, "--eta", 0.5, *given)
        runs = [draw(tiny(key), *arguments, "--batch-size", size) for size in (1, 3)]
        assert [len(images) for images in runs] == [4, 4]
        for one, other in zip(*runs, strict=True):
            assert np.abs(one - other).max() <= 1
        assert all(np.abs(runs[0][0] - other).max() > 1 for other in runs[0][1:])


def test_small_strength_gives_the_image_back_through_the_autoencoder(draw: Draw) -> None:
    """With the trained model; the more of the steps run, the farther the sample is from the image."""
    start = EMOJI / "emoji" / "green-apple.png"
    model = load_release(*TRAINED)
    given = torch.from_numpy(pixels(start)).permute(2, 0, 1)[None] / 127.5 - 1
    latent = model.most_likely_latent(model.encode_first_stage(given))
    through = ((model.decode_first_stage(latent)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    for sampler in ("ddim", "dpm_solver"):
        common = ("--prompt", "green apple", "--scale", 1, "--init-image", start, "--sampler", sampler, "--strength")
        distances = [np.abs(draw(TRAINED, *common, strength, steps=20)[0] - through).mean() for strength in (0.01, 0.5)]
        distances += [
            np.abs(draw(TRAINED, "--prompt", "a face", "--scale", 1, "--sampler", sampler)[0] - through).mean()
        ]
        assert distances[0] < 3 and distances == sorted(distances), (sampler, distances)


def test_unmasked_pixels_are_those_of_the_image(tiny: Callable, draw: Draw, work: Path) -> None:
    """By re-noising in ordinary models of each prediction, and by the maps of inpainting ones."""
    for key in ("sd1", "sd2_768_v", "sdxl", "sd1_inpainting", "sd2_inpainting", "sdxl_inpainting"):
        for sampler in ("ddim", "dpm_solver") if key == "sd1" else ("ddim",):
            arguments = ("--prompt", "red apple", "--image", "image.png", "--mask", "mask.png", "--sampler", sampler)
            [image] = draw(tiny(key), *arguments)
            assert np.array_equal(image[:16], pixels("image.png")[:16]), key
            assert np.abs(image[16:] - pixels("image.png")[16:]).mean() > 3, key
    assert last_settings(work)["mask"] == "mask.png"


def test_masked_start_from_an_image(draw: Draw, work: Path) -> None:
    """--init-image with --image and --mask: the masked part starts from it, in the trained model."""
    dog = EMOJI / "emoji" / "dog-face.png"
    masked = ("--prompt", "red apple", "--scale", 3, "--image", dog, "--mask", "mask.png")
    [free] = draw(TRAINED, *masked, steps=10)
    [near] = draw(TRAINED, *masked, "--init-image", dog, "--strength", 0.1, steps=10)
    assert np.array_equal(near[:16], pixels(dog)[:16])
    assert np.abs(near - pixels(dog)).mean() < np.abs(free - pixels(dog)).mean() / 2
    assert (last_settings(work)["strength"], last_settings(work)["init_image"]) == (0.1, str(dog))


def test_two_guidances_of_an_edit(tiny: Callable, draw: Draw, work: Path) -> None:
    """Scales of 1 give the plain prediction under the image and the prompt, as sampled by hand."""
    edit = ("--prompt", "red apple", "--image", "image.png")
    [plain] = draw(tiny("instruct_pix2pix"), *edit, "--scale", 1, "--image-scale", 1)
    model = load_release(*tiny("instruct_pix2pix"))
    given = torch.from_numpy(pixels("image.png")).permute(2, 0, 1)[None] / 127.5 - 1
    cond = PromptConditioning(model, maps=[model.encode_first_stage(given).mode()]).of(["red apple"])
    seeded = {"generators": [torch.Generator().manual_seed(42)], "verbose": False}
    latent, _ = DDIMSampler(model).sample(2, 1, (4, 8, 8), cond, **seeded)
    by_hand = ((model.decode_first_stage(latent)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(plain - by_hand).max() <= 1
    [near] = draw(tiny("instruct_pix2pix"), *edit, "--scale", 1.0001, "--image-scale", 1.0001)
    assert np.abs(plain - near).max() <= 1
    [default] = draw(tiny("instruct_pix2pix"), *edit)
    assert last_settings(work)["image_scale"] == 1.5
    [other] = draw(tiny("instruct_pix2pix"), *edit, "--image-scale", 4)
    assert np.abs(default - plain).max() > 1 and np.abs(default - other).max() > 1


def test_sizes_of_sdxl(tiny: Callable, draw: Draw, work: Path) -> None:
    [default] = draw(tiny("sdxl"), "--prompt", "red apple")
    own = ("--original-size", SIDE, SIDE, "--crop", 0, 0, "--target-size", SIDE, SIDE)
    assert np.array_equal(draw(tiny("sdxl"), "--prompt", "red apple", *own)[0], default)
    [cropped] = draw(tiny("sdxl"), "--prompt", "red apple", "--crop", 32, 0)
    assert np.abs(cropped - default).max() > 1
    assert (last_settings(work)["crop_top_left"], last_settings(work)["target_size"]) == ([32, 0], [SIDE, SIDE])
    [negative] = draw(tiny("sdxl"), "--prompt", "red apple", "--negative-prompt", "a dog")
    assert np.abs(negative - default).max() > 1
    [wide] = draw(tiny("sdxl"), "--prompt", "red apple", "--H", 32, "--W", 96, "--precision", "bf16")
    assert wide.shape == (32, 96, 3) and last_settings(work)["original_size"] == [32, 96]


def test_depth_from_a_file_or_from_the_image(tiny: Callable, draw: Draw, work: Path) -> None:
    prompt = ("--prompt", "red apple", "--depth")
    [ramp] = draw(tiny("sd2_depth"), *prompt, "depth.npy")
    assert last_settings(work)["depth"] == "depth.npy"
    np.save("flipped.npy", np.load("depth.npy")[::-1])
    [flipped] = draw(tiny("sd2_depth"), *prompt, "flipped.npy")
    assert np.abs(ramp - flipped).max() > 1
    assert draw(tiny("sd2_depth"), *prompt, "depth.npy", "--init-image", "image.png", "--image", "image.png")
    assert draw(tiny("sd2_depth"), "--prompt", "red apple", "--image", "image.png")


def test_zero_terminal_snr_is_sampled_from_its_end(draw: Draw, work: Path, tmp_path: Path) -> None:
    files = write_tiny("sd2_768_v", tmp_path, rescale_betas_zero_snr=True)
    for sampler in ("ddim", "plms", "dpm_solver"):
        [image] = draw(files, "--prompt", "red apple", "--sampler", sampler, "--guidance-rescale", 0.7)
        assert image.std() > 0
        settings = last_settings(work)
        assert (settings["spacing"], settings["guidance_rescale"]) == ("trailing", 0.7)
    [leading] = draw(files, "--prompt", "red apple", "--spacing", "leading")
    assert last_settings(work)["spacing"] == "leading" and np.abs(leading - image).max() > 1


def test_spacing_changes_the_image_and_is_recorded(tiny: Callable, draw: Draw, work: Path) -> None:
    images = []
    for spacing in ("leading", "trailing", "karras"):
        images += draw(tiny("sd1"), "--prompt", "red apple", "--spacing", spacing)
        assert last_settings(work)["spacing"] == spacing
    assert all(np.abs(a - b).max() > 1 for i, a in enumerate(images) for b in images[:i])
    [default] = draw(tiny("sd1"), "--prompt", "red apple", "--sampler", "dpm_solver")
    [linspace] = draw(tiny("sd1"), "--prompt", "red apple", "--sampler", "dpm_solver", "--spacing", "linspace")
    assert np.array_equal(default, linspace)


def test_files_of_another_size_are_cropped_and_scaled(
    tiny: Callable, draw: Draw, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    [image] = draw(tiny("sd1"), "--prompt", "red apple", "--init-image", "large.png", "--strength", 0.3)
    assert image.shape == (SIDE, SIDE, 3)
    assert "large.png: 96x128 pixels, cropped and scaled to 64x64" in caplog.text


@pytest.mark.parametrize(
    ("key", "arguments", "message"),
    [
        ("sd1", ("--init-image", "missing.png"), "missing.png: No such file"),
        ("sd1", ("--init-image", "prompts.txt"), "prompts.txt: not an image"),
        ("sd1", ("--init-image", "image.png", "--strength", 0), "--strength 0.0: give a number above 0, up to 1"),
        ("sd1", ("--init-image", "image.png", "--strength", 1.5), "--strength 1.5: give a number above 0"),
        ("sd1", ("--strength", 0.5), "--strength 0.5: give --init-image too"),
        ("sd1", ("--mask", "mask.png"), "--mask mask.png: give --image too"),
        ("sd1", ("--image", "image.png"), "--image: this model repaints only under a mask; give --mask too"),
        ("sd1", ("--image", "large.png", "--mask", "mask.png"), "--mask mask.png: has 64x64 pixels, --image large.png"),
        ("sd1", ("--image", "image.png", "--mask", "black.png"), "black.png: no pixel of the mask is white"),
        ("sd1", ("--depth", "depth.npy"), "--depth: this model does not use a depth map"),
        ("sd1", ("--image-scale", 2), "--image-scale 2.0: this model does not edit images"),
        ("sd1", ("--image-scale", "nan"), "--image-scale nan: give a finite number"),
        ("sd1", ("--crop", 0, 0), "this model is not conditioned on sizes"),
        ("sd1", ("--guidance-rescale", 2), "--guidance-rescale 2.0: give a number from 0 to 1"),
        ("sd1", ("--guidance-rescale", 0.5, "--scale", 1), "--guidance-rescale 0.5: needs guidance"),
        ("sd1", ("--sampler", "plms", "--spacing", "karras"), "spacing karras: PLMS needs equal steps"),
        ("sd1", ("--H", 48), "--H 48: must be a multiple of 32"),
        ("sd1_inpainting", (), "this model repaints a part of an image; give --image and --mask"),
        ("instruct_pix2pix", (), "this model edits an image; give --image"),
        ("sd2_depth", (), "this model needs a depth map; give --depth"),
        ("sd2_depth", ("--depth", "image.png", "--image", "large.png"), "--depth image.png: has 64x64 values"),
        ("sdxl", ("--original-size", 0, 64), "--original-size 0: give a whole number of at least 1"),
        ("sdxl", ("--crop", -1, 0), "--crop -1: give a whole number of at least 0"),
    ],
)
def test_bad_inputs_are_one_line(
    tiny: Callable, work: Path, run_tool: Callable, key: str, arguments: tuple, message: str
) -> None:
    release, config = tiny(key)
    common = ("--ckpt", release, "--config", config, "--steps", 2, "--out", "out", "--prompt", "red apple")
    said = run_tool(TXT2IMG, *common, *arguments)
    assert said.startswith("error: ") and "\n" not in said
    assert message in said
    assert not (work / "out").exists()
