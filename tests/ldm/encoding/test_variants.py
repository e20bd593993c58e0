"""Variants of images and loss masks, which are cropped and mirrored together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.encoding.kinds import DepthSamples, EditSamples, ImageSamples, MaskedSamples
from ldm.encoding.loss_masks import LossMaskSamples
from ldm.encoding.variants import Variants, VariantSamples
from ldm.shards.index import read_index
from ldm.shards.reader import ShardDataset
from ldm.shards.verify import file_sha256
from ldm.util import UserError
from tests.ldm.encoding.toy_encoder import run

KEYS = ("loss_mask", "json", "crop_top_left", "original_size")


def write_images(folder: Path) -> Path:
    """Write grey images that are their own masks: light where the mask is white, in two proportions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(((256, 256), (128, 384), (200, 200))):
        blocks = rng.integers(0, 256, (height // 32, width // 32), dtype=np.uint8)
        grey = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        grey.convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("grey")
        if number < 2:
            grey.save(folder / f"{number}.mask.png")
    return folder


def test_masks_move_with_crops_flips_buckets_and_sizes(tmp_path: Path) -> None:
    """The toy encoder's first channel is the mean of a cell, so that it shows the mask."""
    images = write_images(tmp_path / "in")
    options = {"size": 128, "buckets": True, "flip": True, "loss_masks": True, "variants": Variants(3, 0.5)}
    report, _ = run(images, tmp_path / "s.tar", **options)
    assert (report.samples, report.without_mask) == (6, 1)
    dataset = ShardDataset([tmp_path / "s.tar"], extra=KEYS)
    assert {key: list(shapes) for key, shapes in dataset.shapes.items() if key in ("f8", "loss_mask")} == {
        "f8": [(8, 16, 16), (8, 8, 32)],
        "loss_mask": [(1, 16, 16), (1, 8, 32)],
    }
    assert [len(group) for group in dataset.groups()] == [4, 2]
    plain = [dataset[number] for number in range(6)]
    dataset.keeps_variants = True
    for number, sample in enumerate(dataset[number] for number in range(6)):
        assert sample["f8"].shape[0] == 3 and len({view.tobytes() for view in sample["f8"]}) == 3
        np.testing.assert_array_equal(sample["f8"][0], plain[number]["f8"])
        np.testing.assert_array_equal(sample["loss_mask"][0], plain[number]["loss_mask"])
        if number < 4:
            shown = (sample["f8"][:, 0].astype(np.float32) + 1) / 2
            np.testing.assert_allclose(shown, sample["loss_mask"][:, 0], atol=0.01)
        else:
            assert (sample["loss_mask"] == 1).all()
    mirrored = dataset[1]
    np.testing.assert_allclose(dataset[0]["f8"][..., ::-1], mirrored["f8"], atol=1e-3)
    np.testing.assert_array_equal(dataset[0]["loss_mask"][..., ::-1], mirrored["loss_mask"])
    index = read_index(tmp_path)
    assert index["variants"] == 3 and index["without_mask"] == 1 and index["members"] == ["f8", "loss_mask", "t5"]


def test_each_variant_has_its_crop_coordinates(tmp_path: Path) -> None:
    run(
        write_images(tmp_path / "in"),
        tmp_path / "s.tar",
        size=128,
        flip=True,
        loss_masks=True,
        variants=Variants(3, 0.5),
    )
    dataset = ShardDataset([tmp_path / "s.tar"], extra=KEYS[1:])
    assert dataset[0]["crop_top_left"].tolist() == [0, 0] and dataset[2]["crop_top_left"].tolist() == [0, 128]
    dataset.keeps_variants = True
    for number in range(0, 6, 2):
        own, mirrored = dataset[number], dataset[number + 1]
        described = [own["json"], *own["json"]["variants"]]
        for place, (view, corner) in enumerate(zip(described, own["crop_top_left"], strict=True)):
            top, left, rows, columns = view["crop"]
            width = own["json"]["width"]
            assert rows == columns and top + rows <= own["json"]["height"] and left + columns <= width
            assert abs(corner[0] - top * 128 / rows) <= 0.5 and abs(corner[1] - left * 128 / columns) <= 0.5
            right = (width - left - columns) * 128 / columns
            assert abs(mirrored["crop_top_left"][place][1] - right) <= 0.5
        assert own["original_size"].shape == (2,)


def test_variants_are_seeded_by_name_and_their_colours_differ(tmp_path: Path) -> None:
    images, variants = write_images(tmp_path / "in"), Variants(2, 1.0, 0.5)
    for name in ("one", "two"):
        run(images, tmp_path / name / "s.tar", size=128, variants=variants)
    assert file_sha256(tmp_path / "one/s.tar") == file_sha256(tmp_path / "two/s.tar")
    (tmp_path / "in/0.png").unlink()
    run(images, tmp_path / "three/s.tar", size=128, variants=variants)
    before, after = (ShardDataset([tmp_path / name / "s.tar"]) for name in ("one", "three"))
    before.keeps_variants = after.keeps_variants = True
    np.testing.assert_array_equal(before[2]["f8"], after[1]["f8"])
    assert np.abs(before[2]["f8"][1] - before[2]["f8"][0]).max() > 0.05  # the crop is the same


def test_variant_crops_by_hand() -> None:
    """A wide image: the largest square is 100 pixels high, and a quarter of its area has sides of 50."""
    crops = Variants(200, 0.25).crops("a.png", 100, 300, (64, 64))
    assert crops[0] == (0, 100, 100, 100) and crops == Variants(200, 0.25).crops("a.png", 100, 300, (64, 64))
    sides = [rows for _, _, rows, columns in crops[1:] if rows == columns]
    assert len(sides) == 199 and 50 <= min(sides) < 60 and 95 < max(sides) <= 100
    lefts = [left for _, left, _, _ in crops]
    assert min(lefts) < 20 and max(left + columns for _, left, _, columns in crops) > 280


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (lambda: VariantSamples(MaskedSamples(4, False), Variants(2)), "--variants 2: not for inpainting"),
        (lambda: VariantSamples(EditSamples(), Variants(2)), "--variants 2: not for pairs of images"),
        (lambda: LossMaskSamples(EditSamples(), 8), "--loss-masks: not for pairs of images"),
        (lambda: LossMaskSamples(MaskedSamples(4, False), 8), "--loss-masks: not for inpainting"),
        (lambda: VariantSamples(DepthSamples(), Variants(2)), "--variants 2: not for depth models"),
    ],
)
def test_kinds_that_are_refused(kind, said: str) -> None:
    with pytest.raises(UserError, match=said):
        kind()


def test_a_set_without_variants_and_masks_is_as_before(tmp_path: Path) -> None:
    run(write_images(tmp_path / "in"), tmp_path / "s.tar", size=128)
    index = json.loads((tmp_path / "index.json").read_text())
    assert not {"variants", "variant_area", "loss_masks", "without_mask"} & {*index, *index["made_from"]}
    assert "variants" not in ShardDataset([tmp_path / "s.tar"], extra=["json"])[0]["json"]
    assert ImageSamples.members == ("f8",)
