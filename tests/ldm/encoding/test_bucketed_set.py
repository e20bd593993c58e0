"""Images in sizes of their own proportions: cropped little, written in order, and trained on size by size."""

import numpy as np
import pytest
from PIL import Image

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.encoding.read import FittedImage, batches
from ldm.shards.index import read_index
from ldm.shards.reader import ShardDataset
from ldm.util import UserError
from tests.ldm.encoding.toy_encoder import image, run

WIDE, SQUARE, TALL = (80, 20), (30, 32), (10, 60)
SIZES = [WIDE, SQUARE, SQUARE, TALL, WIDE, SQUARE, SQUARE, WIDE]  # width, height


@pytest.fixture
def images(tmp_path):
    for number, size in enumerate(SIZES):
        image(tmp_path / "images" / f"p{number}.png", size, caption=f"image {number}")
    return tmp_path / "images"


def test_a_bucketed_set(images, tmp_path):
    out = tmp_path / "out" / "s-%d.tar"
    _, model = run(images, out, size=128, buckets=True, shard_size=8)
    dataset = ShardDataset([out.parent / "s-0.tar"], extra=["json"])
    assert [dataset[i]["txt"] for i in range(8)] == [f"image {i}" for i in range(8)]
    shapes = {WIDE: (8, 8, 32), SQUARE: (8, 16, 16), TALL: (8, 32, 8)}
    assert [dataset[i]["f8"].shape for i in range(8)] == [shapes[size] for size in SIZES]
    assert dataset[0]["json"]["size"] == [64, 256] and dataset[0]["json"]["crop"] == [0, 0, 20, 80]
    assert dataset[1]["json"]["size"] == [128, 128] and dataset[1]["json"]["crop"] == [1, 0, 30, 30]
    assert dataset[3]["json"]["size"] == [256, 64] and dataset[3]["json"]["crop"] == [10, 0, 40, 10]
    assert sorted(model.first_stage_model.calls) == [1, 1, 2, 2, 2]  # batches of two, of one size
    index = read_index(out.parent)
    assert index["sizes"] == {"128x128": 4, "256x64": 1, "64x256": 3} and index["buckets"]
    assert index["f8"] == [[8, 8, 32], [8, 16, 16], [8, 32, 8]]


def test_what_is_kept_is_the_middle_of_the_image(tmp_path):
    pixels = np.zeros((40, 200, 3), np.uint8)
    pixels[:, 20:100, 0], pixels[:, 100:180, 1] = 255, 255  # black, red, green, black
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    run(tmp_path / "in", tmp_path / "s.tar", caption="x", size=128, buckets=True)
    means = ShardDataset([tmp_path / "s.tar"])[0]["f8"][:3].astype(np.float32)  # the toy's: eighth-size means
    assert means.shape == (3, 8, 32)
    np.testing.assert_allclose(means[0, :, 1:15], 1, atol=0.05)
    np.testing.assert_allclose(means[0, :, 17:], -1, atol=0.05)
    np.testing.assert_allclose(means[1, :, 17:31], 1, atol=0.05)


def test_buckets_batch_together_in_training(images, tmp_path):
    out = tmp_path / "out" / "s-%d.tar"
    run(images, out, size=128, buckets=True, shard_size=3)
    data = WebDataNpyModuleFromConfig(3, str(out.parent), null_cond_dropout=0.1, seed=1)
    data.setup("fit")
    found = [(batch["f8"].shape[2:], len(batch["txt"])) for batch in data.train_dataloader()]
    assert sorted(found) == [((8, 32), 3), ((16, 16), 1), ((16, 16), 3), ((32, 8), 1)]


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_no_image_waits_for_long(ahead):
    pixels = {size: np.zeros((3, *size), np.uint8) for size in ((8, 8), (8, 16), (16, 8))}
    rng = np.random.default_rng(0)
    sizes = [list(pixels)[i] for i in rng.choice(3, 200, p=[0.9, 0.09, 0.01])]
    seen = []

    def arriving():
        for number, size in enumerate(sizes):
            seen.append(number)
            yield FittedImage(number, None, pixels[size], 1, 1, (0, 0, 1, 1))

    out = []
    for batch in batches(arriving(), 4, ahead):
        assert len({image.size for _, image in batch}) == 1 and 1 <= len(batch) <= 4
        assert all(place == image.number for place, image in batch)
        assert len(seen) - 1 - batch[0][0] <= ahead or len(seen) == 200
        out += [place for place, _ in batch]
    assert sorted(out) == list(range(200))


def test_a_size_that_makes_no_buckets(images, tmp_path):
    with pytest.raises(UserError, match="--size 100: with --buckets, give a multiple of 64"):
        run(images, tmp_path / "s.tar", size=100, buckets=True)
