"""What is stored of an image for each kind of model: masks and masked images, pairs, sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.encoding import kinds
from ldm.encoding.kinds import EditSamples, ImageSamples, MaskedSamples, samples_for
from ldm.images.transforms import to_range
from ldm.models.diffusion import ddpm_edit
from ldm.models.diffusion.ddpm import LatentDepth2ImageDiffusion, LatentInpaintDiffusion, LatentUpscaleDiffusion
from ldm.shards import npy
from ldm.shards.index import read_index
from ldm.shards.reader import ShardDataset
from ldm.util import UserError
from tests.ldm.encoding.toy_encoder import FirstStage, Model, image, run


class Inpainting(Model, LatentInpaintDiffusion):
    """The toy model, as one that paints into masks."""

    channels = 4

    def __init__(self) -> None:
        Model.__init__(self)


class Editing(Model, ddpm_edit.LatentDiffusion):
    channels = 4

    def __init__(self) -> None:
        Model.__init__(self)


@pytest.fixture(autouse=True)
def _toys_have_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `nn.Module.__init__`, attributes are set as on any object."""
    for toy in (Inpainting, Editing):
        monkeypatch.setattr(toy, "__setattr__", object.__setattr__)
    monkeypatch.setattr("ldm.encoding.encoder.family_of_model", lambda model: None)


def masked_set(tmp_path: Path, name: str = "s.tar", **options) -> ShardDataset:
    if not (tmp_path / "in").exists():
        for number in range(3):
            image(tmp_path / "in" / f"p{number}.png", (64 * (1 + number % 2), 64), caption=f"image {number}")
    run(tmp_path / "in", tmp_path / name, Inpainting(), **{"size": 64, **options})
    masks = options.get("masks") or 4
    paths = sorted(tmp_path.glob(name.replace("%d", "*")))
    dataset = ShardDataset(paths, extra=["mask", "masked_image", "json"])
    assert sum(key.startswith("mask.") for key in dataset.keys) == masks - 1
    return dataset


def test_masks_are_stored_with_the_posteriors_of_masked_images(tmp_path: Path) -> None:
    """Each mask is that of a whole image at every eighth pixel, under which the image is 0 before it is encoded."""
    dataset = masked_set(tmp_path, flip=True)
    assert len(dataset) == 6
    stage, seen = FirstStage(), []
    for number in range(6):
        sample, mirrored = dataset[number], number % 2
        pixels = np.zeros((3, 64, 64), np.uint8)
        pixels[0, :, :32] = 255  # the crop's middle is the image's: half is red
        pixels = pixels[..., ::-1].copy() if mirrored else pixels
        for place in range(4):
            with kinds.seeded(0, number // 2, place + 4 * mirrored):
                mask = kinds.random_mask(64, 64, kinds.style_of("512train"))[..., 0]
            key = f".{place}" if place else ""
            stored, hidden = sample[f"mask{key}"], sample[f"masked_image{key}"]
            assert stored.shape == (1, 8, 8) and stored.dtype == np.float16
            np.testing.assert_array_equal(stored[0], mask[::8, ::8].numpy())
            expected = stage.encode((to_range(torch.from_numpy(pixels)) * (mask < 0.5))[None]).parameters[0]
            np.testing.assert_allclose(hidden[:4], expected[:4].half(), atol=2e-3)
            assert hidden.shape == sample["f8"].shape and hidden.dtype == np.float16
            seen.append(mask.numpy().tobytes())
    assert len(set(seen)) == 24  # all differ, those of mirror images too


def test_masks_do_not_depend_on_how_the_set_was_made(tmp_path: Path) -> None:
    masked_set(tmp_path, "a/s-%d.tar", shard_size=2)
    masked_set(tmp_path, "b/s-%d.tar", shard_size=2, workers=2, batch_size=3)
    assert read_index(tmp_path / "a")["shards"] == read_index(tmp_path / "b")["shards"]
    assert read_index(tmp_path / "a")["masks"] == 4
    assert read_index(tmp_path / "a")["members"] == ["f8", "mask", "masked_image", "t5"]


def test_a_wholly_masked_image_is_stored_once_for_each_size(tmp_path: Path) -> None:
    image(tmp_path / "in/wide.png", (300, 64))
    image(tmp_path / "in/square.png", (64, 64))
    masked_set(tmp_path, "set/s.tar", size=128, buckets=True, masks=1)
    names = sorted(path.name for path in (tmp_path / "set").glob("null.masked*"))
    assert names == ["null.masked_image.16x16.npy", "null.masked_image.8x32.npy"]
    blank = npy.decode(bytearray((tmp_path / "set" / names[1]).read_bytes()), names[1])
    assert blank.shape == (8, 8, 32) and not blank[:4].any()  # the toy's mean of an image of zeros
    masked_set(tmp_path, "set/s.tar", overwrite=True)
    assert [path.name for path in (tmp_path / "set").glob("null.masked*")] == ["null.masked_image.8x8.npy"]


def test_the_number_of_masks_is_part_of_an_unfinished_set(tmp_path: Path) -> None:
    masked_set(tmp_path, "s-%d.tar", shard_size=1)
    index = read_index(tmp_path)
    assert index["made_from"]["masks"] == 4


@pytest.mark.parametrize(
    ("model", "masks", "message"),
    [
        (Model(), 3, "--masks 3: .*leave it out"),
        (LatentUpscaleDiffusion.__new__(LatentUpscaleDiffusion), None, "LR, which shards do not hold"),
        (LatentDepth2ImageDiffusion.__new__(LatentDepth2ImageDiffusion), None, "no depth network.*depth_stage_config"),
    ],
)
def test_samples_for_refuses(model, masks, message, monkeypatch: pytest.MonkeyPatch) -> None:
    if masks is None:
        parts = {"model": type("Wrapper", (), {"takes_maps": True}), "concat_keys": ("LR",), "depth_model": None}
        for name, value in parts.items():
            object.__setattr__(model, name, value)
    with pytest.raises(UserError, match=message):
        samples_for(model, masks)


def test_samples_for_knows_the_kinds() -> None:
    kinds_of = [type(samples_for(model)) for model in (Model(), Inpainting(), Editing())]
    assert kinds_of == [ImageSamples, MaskedSamples, EditSamples]


def pair(folder: Path, name: str, before, after, caption: str = "make it green") -> None:
    image(folder / f"{name}.png", before, (255, 0, 0), caption)
    image(folder / f"{name}.edited.png", after, (0, 255, 0), None)


def test_pairs_become_one_sample(tmp_path: Path) -> None:
    """The edited image's posterior, and the mode alone of the image before, cropped and mirrored alike."""
    pair(tmp_path / "in", "a", (20, 16), (40, 32))
    pair(tmp_path / "in", "b", (16, 20), (16, 20), "make it round")
    report, _ = run(tmp_path / "in", tmp_path / "s.tar", Editing(), pairs=True, flip=True)
    assert (report.samples, report.images) == (4, 2)
    dataset = ShardDataset([tmp_path / "s.tar"], extra=["edit", "json"])
    first, mirrored, second, _ = (dataset[number] for number in range(4))
    assert first["f8"].shape == (8, 2, 2) and first["edit"].shape == (4, 2, 2) and first["txt"] == "make it green"
    assert second["txt"] == "make it round"
    red, green = ((values[..., :1] > 0).all() for values in (first["edit"][0], first["f8"][1]))
    assert red and green and (first["edit"][1] < 0).all() and (first["f8"][0] < 0).all()
    np.testing.assert_array_equal(mirrored["edit"], first["edit"][..., ::-1])
    np.testing.assert_array_equal(mirrored["f8"], first["f8"][..., ::-1])
    assert first["__key__"] == "000000_a" and first["json"]["original_size"] == [32, 40]
    assert read_index(tmp_path)["members"] == ["f8", "edit", "t5"]


def test_a_pair_of_two_proportions_is_left_out(tmp_path: Path) -> None:
    pair(tmp_path / "in", "a", (20, 16), (20, 16))
    pair(tmp_path / "in", "b", (20, 16), (16, 20))
    pair(tmp_path / "in", "c", (200, 160), (201, 160))  # as another program rounds
    image(tmp_path / "in" / "d.png")
    report, _ = run(tmp_path / "in", tmp_path / "s.tar", Editing(), pairs=True)
    assert report.samples == 2
    assert [failed["name"] for failed in report.failed] == ["b.png", "d.png"]
    assert "20x16" in report.failed[0]["reason"] and "16x20" in report.failed[0]["reason"]


@pytest.mark.parametrize(
    ("size", "orientation", "original", "corner", "mirrored"),
    [
        # width x height; at 32 pixels, the shorter side is doubled from 16
        ((20, 16), 1, [16, 20], [0, 4], [0, 4]),  # 2 of 20 columns go at the left, 2 at the right
        ((21, 16), 1, [16, 21], [0, 4], [0, 6]),  # 2 at the left, 3 at the right
        ((16, 21), 1, [21, 16], [4, 0], [4, 0]),
        ((21, 16), 6, [21, 16], [4, 0], [4, 0]),  # stored on its side: upright it is 16 wide and 21 high
        ((16, 21), 8, [16, 21], [0, 4], [0, 6]),
        ((64, 64), 1, [64, 64], [0, 0], [0, 0]),
        ((100, 64), 1, [64, 100], [0, 9], [0, 9]),  # 18 columns, halved
    ],
)
def test_sizes_of_crops_flips_and_turns(tmp_path: Path, size, orientation, original, corner, mirrored) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "in").mkdir()
    Image.new("RGB", size).save(tmp_path / "in/a.jpg", exif=exif)
    run(tmp_path / "in", tmp_path / "s.tar", size=32, flip=True, caption="x")
    dataset = ShardDataset([tmp_path / "s.tar"], extra=["json"])
    names = ("original_size", "crop_top_left", "target_size")
    found = [[dataset[number]["json"][name] for name in names] for number in range(2)]
    assert found == [[original, corner, [32, 32]], [original, mirrored, [32, 32]]]


def test_sizes_in_buckets(tmp_path: Path) -> None:
    image(tmp_path / "in/wide.png", (300, 100))
    run(tmp_path / "in", tmp_path / "s.tar", size=128, buckets=True)
    origin = ShardDataset([tmp_path / "s.tar"], extra=["json"])[0]["json"]
    # 64x256 is the widest: 400 columns of 100 rows; all rows and columns fit 3 : 1 less, so 75 rows are kept.
    assert origin["crop"] == [12, 0, 75, 300] and origin["target_size"] == [64, 256]
    assert origin["crop_top_left"] == [10, 0]  # 12 · 64 / 75 = 10.24
