import os
import pickle

import numpy as np
import pytest

from ldm.shards import npy
from ldm.shards.reader import ShardDataset
from ldm.shards.urls import expand_urls
from ldm.util import UserError
from tests.ldm.shard_files import sample_members, write_set, write_tar


def test_samples_come_by_number(shard_set):
    dataset = ShardDataset(expand_urls(shard_set))
    assert len(dataset) == 10
    sample = dataset[7]
    assert (sample["__key__"], sample["txt"]) == ("000007", "caption 7")
    assert sample["f8"].shape == (8, 4, 4) and sample["f8"].dtype == np.float16 and (sample["f8"] == 7).all()
    assert sample["t5"].shape == (7, 6) and (sample["t5"] == 7.5).all()
    assert dataset.shapes == {"f8": {(8, 4, 4): "float16"}, "t5": {(7, 6): "float16"}, "txt": {}}
    assert len(pickle.loads(pickle.dumps(dataset))) == 10  # spawned workers get it so


def test_captions_are_optional_unless_they_are_the_condition(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for m in sample_members(0) if not m[0].endswith(("txt", "json"))])
    assert ShardDataset([path])[0]["txt"] == ""
    with pytest.raises(UserError, match="no member 'txt'"):
        ShardDataset([path], cond_stage_key="txt")


def test_keys_name_the_members(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(name.replace("f8", "latent"), data) for name, data in sample_members(3)])
    assert (ShardDataset([path], "latent")[0]["latent"] == 3).all()
    with pytest.raises(UserError, match=r"sample '000003' has no member 'f8\.npy'") as caught:
        ShardDataset([path])
    assert str(path) in str(caught.value)


def test_images_of_several_sizes_are_grouped(tmp_path):
    members = [m for n, shape in enumerate([(4, 4, 4), (4, 2, 8), (4, 4, 4)]) for m in sample_members(n, shape)]
    groups = ShardDataset([write_tar(tmp_path / "a.tar", members)]).groups()
    assert [group.tolist() for group in groups] == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"f8_shape": (4, 4, 4)},
            r"000001\.f8\.npy: shape \(4, 4, 4\), but f8 of the first sample has shape \(8, 4, 4\)",
        ),
        ({"t5_shape": (7, 5)}, r"000001\.t5\.npy: shape \(7, 5\), but"),
        ({"f8_shape": (8, 16)}, r"not \(channels, height, width\)"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(tmp_path, second, message):
    path = write_tar(tmp_path / "a.tar", sample_members(0) + sample_members(1, **second))
    with pytest.raises(UserError, match=message) as caught:
        ShardDataset([path])
    assert str(path) in str(caught.value)


def test_values_that_are_not_finite_are_named(tmp_path):
    broken = npy.encode(np.full((8, 4, 4), np.nan, np.float16))
    path = write_tar(tmp_path / "a.tar", [("0.f8.npy", broken), *[(f"0.{n[7:]}", d) for n, d in sample_members(0)[1:]]])
    with pytest.raises(UserError, match=r"a\.tar: 0\.f8\.npy: has NaN"):
        ShardDataset([path])[0]


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    members = [(name, b"\xff\xfe" if name.endswith("txt") else data) for name, data in sample_members(0)]
    with pytest.raises(UserError, match=r"000000\.txt"):
        ShardDataset([write_tar(tmp_path / "a.tar", members)])[0]


def test_a_shard_cut_after_it_was_indexed_is_an_error(shard_set):
    paths = expand_urls(shard_set)
    dataset = ShardDataset(paths)
    os.truncate(paths[1], 1000)
    with pytest.raises(UserError, match="was replaced or changed"):
        dataset[9]


def test_no_samples_and_no_file_are_errors(tmp_path):
    with pytest.raises(UserError, match="no samples"):
        ShardDataset([write_tar(tmp_path / "a.tar", [])])
    with pytest.raises(UserError, match="no such file"):
        ShardDataset([tmp_path / "b.tar"])


def test_an_empty_shard_among_others_does_no_harm(tmp_path):
    pattern = write_set(tmp_path, 1, shards=3)
    assert len(ShardDataset(expand_urls(pattern))) == 1
