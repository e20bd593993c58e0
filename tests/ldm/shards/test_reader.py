import json
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


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample_members(0))
    dataset = ShardDataset([path])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"a\.tar: was replaced or changed"):
        dataset[0]


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


def member(name, shape, value=1.0):
    return f"000000.{name}.npy", npy.encode(np.full(shape, value, np.float16))


def described(**entries):
    return [m for m in sample_members(0) if not m[0].endswith("json")] + [("000000.json", json.dumps(entries).encode())]


def test_sizes_come_from_the_json_by_either_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", described(original_size=[16, 20], crop_top_left=[0, 3], target_size=[8, 8]))
    sample = ShardDataset([path], extra=["original_size", "crop_coords_top_left", "target_size_as_tuple"])[0]
    assert sample["original_size"].tolist() == [16, 20] and sample["original_size"].dtype == np.float32
    assert sample["crop_coords_top_left"].tolist() == [0, 3] and sample["target_size_as_tuple"].tolist() == [8, 8]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "has no original_size, which must be two whole numbers"),
        ({"original_size": [16]}, r"\[16\]"),
        ({"original_size": [16, 1.5]}, r"\[16, 1\.5\]"),
        ({"original_size": [True, 2]}, r"\[True, 2\]"),
        ({"original_size": [-1, 2]}, r"\[-1, 2\]"),
        ({"original_size": [1, 1 << 70]}, "original_size"),
        ({"original_size": "16x20"}, "16x20"),
    ],
)
def test_sizes_that_are_none_are_named_before_training(tmp_path, entries, message):
    path = write_tar(tmp_path / "a.tar", described(**entries))
    with pytest.raises(UserError, match=message) as caught:
        ShardDataset([path], extra=["original_size"])
    assert "a.tar: 000000.json: " in str(caught.value) and "\n" not in str(caught.value)
    assert len(ShardDataset([path])) == 1


def test_all_numbered_members_are_read(tmp_path):
    maps = [member(key, (1, 4, 4), n) for n, key in enumerate(["mask", "mask.1", "mask.2"])]
    images = [member(key, (8, 4, 4), n) for n, key in enumerate(["masked_image", "masked_image.1", "masked_image.2"])]
    path = write_tar(tmp_path / "a.tar", sample_members(0) + maps + images)
    dataset = ShardDataset([path], extra=["mask", "masked_image"])
    assert [dataset[0][key].max() for key in ("mask", "mask.1", "mask.2", "masked_image.2")] == [0, 1, 2, 2]
    assert "mask.1" not in ShardDataset([path]).keys
    short = [(name.replace("000000", "000001"), data) for name, data in sample_members(0) + maps + images[:2]]
    path = write_tar(tmp_path / "b.tar", sample_members(0) + maps + images + short)
    with pytest.raises(UserError, match=r"sample '000001' has no member 'masked_image\.2\.npy'"):
        ShardDataset([path], extra=["mask", "masked_image"])


def test_a_map_of_another_size_than_its_latent_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample_members(0), member("edit", (4, 4, 2))])
    with pytest.raises(UserError, match=r"000000\.edit\.npy: shape \(4, 4, 2\).* \(8, 4, 4\)"):
        ShardDataset([path], extra=["edit"])


def test_a_member_of_another_family_is_told_of(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample_members(0))
    with pytest.raises(UserError, match=r"has no member 'pooled\.npy'.*encode the images again"):
        ShardDataset([path], extra=["pooled"])
