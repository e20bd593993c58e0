"""Tests of the inspection on sets with known numbers."""

import json
import math

import numpy as np
import pytest

from ldm.inspection.data_report import format_inspection
from ldm.inspection.measure import Moments, inspect, latent_channels, open_to_inspect
from ldm.shards import npy
from ldm.shards.index import write_index
from ldm.shards.writer import Shard
from ldm.util import UserError


def write(folder, samples):
    """Write a shard of samples `(key, f8, caption, json)`, where None leaves a member out; return its path."""
    with Shard(folder / "s.tar") as shard:
        for key, f8, caption, origin in samples:
            members = {"f8.npy": npy.encode(f8.astype(np.float16))}
            members |= {"txt": caption.encode()} if caption is not None else {}
            members |= {"json": json.dumps(origin).encode()} if origin is not None else {}
            shard.write(key, members)
    return str(folder / "s.tar")


def latent(value, shape=(4, 2, 2)):
    return np.full(shape, value, np.float32)


def origin(height, width, crop=(0, 0, 64, 64), size=(64, 64), flip=False):
    return {"source": "x", "height": height, "width": width, "crop": crop, "size": size, "flip": flip}


def test_moments_by_hand():
    moments = Moments(2)
    means = np.array([[[0.0, 2.0]], [[1.0, 1.0]]])  # C h w
    log_variances = np.log([[[1.0, 3.0]], [[0.5, 0.5]]])
    moments.add(np.concatenate([means, log_variances]))
    moments.add(np.array([[[4.0, 2.0]], [[1.0, 1.0]]]))  # a latent has no variance
    found = moments.to_dict()
    assert found["channel_mean"] == pytest.approx([2.0, 1.0])
    # z² : (0+1) + (4+3) + 16 + 4 = 28 over 4; (1+0.5)·2 + 1 + 1 = 5 over 4
    assert found["channel_std"] == pytest.approx([math.sqrt(7 - 4), math.sqrt(1.25 - 1)])
    assert (found["mean"], found["std"]) == (pytest.approx(1.5), pytest.approx(math.sqrt(4.125 - 2.25)))


@pytest.mark.parametrize(("channels", "of_latent"), [(4, 4), (8, 4), (16, 8), (3, 3), (9, 9)])
def test_latent_channels_of_posteriors_and_latents(tmp_path, channels, of_latent):
    urls = write(tmp_path, [("a", latent(1, (channels, 2, 2)), None, None)])
    assert latent_channels(open_to_inspect(urls)) == of_latent


def inspected(tmp_path, samples, scale_factor=0.5):
    return inspect(open_to_inspect(write(tmp_path, samples)), 4, scale_factor)


def test_duplicates_and_mirror_images(tmp_path):
    found = inspected(
        tmp_path,
        [
            ("a", latent(1), "a cat", origin(64, 64)),
            ("a_flip", latent(2), "a cat", origin(64, 64, flip=True)),
            ("b", latent(1), "a cat", origin(64, 64)),
            ("c", latent(3), "a dog", origin(64, 64)),
            ("d", latent(3), "", None),
            ("e", latent(3), None, None),
        ],
    )
    assert (found["samples"], found["mirrored"], found["shapes"]) == (6, 1, {"4x2x2": 6})
    assert found["duplicates"]["captions"] == [{"caption": "a cat", "samples": 2}, {"caption": "", "samples": 2}]
    assert found["duplicates"]["latents"] == [["a", "b"], ["c", "d", "e"]]
    assert (found["captions"]["captions"], found["captions"]["distinct"], found["captions"]["empty"]) == (5, 3, 2)
    assert found["latents"]["expected_std"] == 2.0


def test_captions_are_truncated_to_75_tokens(tmp_path):
    captions = ["cat " * 75, "cat " * 76, "cat " * 12, "cat"]
    found = inspected(tmp_path, [(str(i), latent(i), text, None) for i, text in enumerate(captions)])["captions"]
    assert (found["truncated"], found["tokens_max"], found["longest"]) == (1, 76, captions[1])
    assert found["tokens_median"] == (12 + 75) / 2
    counts = {name: count for name, count in found["tokens"].items() if count}
    assert counts == {"0-9": 1, "10-19": 1, "70-75": 1, "76-150": 1}


def test_the_limit_is_that_of_the_set(tmp_path):
    captions = [(str(n), latent(n), "cat " * n, None) for n in (5, 100, 150, 151)]
    assert inspected(tmp_path, captions)["captions"]["truncated"] == 3
    write_index(tmp_path, {"shards": [{"name": path.name} for path in tmp_path.glob("*.tar")], "max_tokens": 150})
    found = inspect(open_to_inspect(str(tmp_path)), 4, 0.5)["captions"]
    assert (found["truncated"], found["token_limit"]) == (1, 150)


def test_captions_of_further_chunks_have_bins(tmp_path):
    found = inspected(tmp_path, [(str(n), latent(n), "cat " * n, None) for n in (5, 77, 78, 3000)])["captions"]
    assert found["tokens_max"] == 3000 and len(found["tokens"]) == 11
    assert {name: count for name, count in found["tokens"].items() if count} == {"0-9": 1, "76-150": 2, "226-": 1}


def test_originals_and_enlarged_ones(tmp_path):
    origins = [
        origin(300, 2000, crop=[0, 850, 300, 300], size=[512, 512]),
        origin(512, 600, crop=[0, 44, 512, 512], size=[512, 512]),
        origin(3000, 2500, crop=[250, 0, 2500], size=512),  # format 1 stores the side of a square
        origin(100, 100, crop=[0, 0, 100], size=512),
        {"source": "from another program"},
        None,
    ]
    found = inspected(tmp_path, [(str(i), latent(i), "x", entry) for i, entry in enumerate(origins)])["originals"]
    assert (found["known"], found["enlarged"]) == (4, 2)
    assert {name: n for name, n in found["shorter_side"].items() if n} == {
        "0-256": 1,
        "256-512": 1,
        "512-768": 1,
        "2048-": 1,
    }


def test_format_inspection(tmp_path):
    samples = [("a", latent(1), "a cat", origin(64, 64)), ("b", latent(1, (4, 2, 4)), "a cat", None)]
    found = inspected(tmp_path, samples)
    index = {"format": 2, "autoencoder": "abc", "failed": [{"name": "x.png", "reason": "broken"}]}
    text = format_inspection(found, index)
    for expected in (
        "2 samples in 1 shard, ",
        "1 image could not be read, such as x.png: broken",
        "autoencoder: abc",
        "4x2x4 ######################################## 1",
        "0 of 1 were enlarged",
        "1 caption used more than once, by 2 images",
        "2 x 'a cat'",
        "0 latents stored more than once, in 0 samples",
        "0 truncated to 75 tokens",
        "the model expects a std of 2.0000",
    ):
        assert expected in text
    index["failed"] = [{"name": "x.png", "reason": "x.png: not an image (PNG)"}] * 2
    assert "2 images could not be read, such as x.png: not an image (PNG)\n" in format_inspection(found, index)
    short = format_inspection(inspected(tmp_path, [("a", latent(1), "", None)], None), {})
    assert "originals: the samples have no record of their sizes" in short and "expects" not in short


def test_streams_are_refused():
    with pytest.raises(UserError, match="pipe:cat x: is a stream"):
        open_to_inspect("pipe:cat x")
