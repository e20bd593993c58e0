"""Tests of opening sets of shards, and of the messages about unusable ones."""

import numpy as np
import pytest

from ldm.evaluation.sets import open_set, parse_sets
from ldm.shards import npy
from ldm.util import UserError
from tests.ldm.evaluation.conftest import KEYS, members
from tests.ldm.shard_files import write_tar


def test_parse_sets():
    assert parse_sets(["new=a/*.tar", "rest=b=c.tar"]) == {"new": "a/*.tar", "rest": "b=c.tar"}


@pytest.mark.parametrize("entries", [["shards.tar"], ["=a.tar"], ["new="], ["a b=c.tar"], ["a=1.tar", "a=2.tar"]])
def test_parse_sets_refuses_other_forms(entries):
    with pytest.raises(UserError, match=f"--set {entries[-1]}: ") as caught:
        parse_sets(entries)
    assert "\n" not in str(caught.value)


def test_a_set_holds_all_samples_in_order_or_a_limited_number(shard, model):
    whole, some = open_set("a", str(shard), model), open_set("a", str(shard), model, limit=2)
    assert whole.keys == KEYS and [whole[i]["__key__"] for i in range(5)] == KEYS
    assert some.keys == ["a", "c"] and some[1]["__key__"] == "c"
    digests = {image_set.digest(timesteps) for image_set in (whole, some) for timesteps in ([1, 2], [1, 3])}
    assert len(digests) == 4 and all(len(digest) == 32 for digest in digests)


def test_a_batch_has_images_of_one_size(tmp_path, model):
    shapes = {"a": (8, 4, 4), "b": (8, 4, 6), "c": (8, 4, 4), "d": (8, 4, 4)}
    path = write_tar(
        tmp_path / "mixed.tar", [member for key, shape in shapes.items() for member in members(key, shape)]
    )
    assert list(open_set("a", str(path), model).batches(2)) == [[0, 2], [3], [1]]


def test_a_model_takes_captions_with_a_text_encoder_and_stored_encodings_without(shard, model, reader):
    assert set(open_set("a", str(shard), model).dataset.shapes) >= {"f8", "t5"}
    path = write_tar(shard.with_name("no-t5.tar"), [member for member in members("a") if "t5" not in member[0]])
    assert open_set("a", str(path), reader)[0]["txt"] == "an image of a"
    with pytest.raises(UserError, match=r"set 'a': .*sample 'a' has no member 't5.npy'"):
        open_set("a", str(path), model)


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("nowhere.tar", "nowhere.tar: no such file"),
        ("no/*.tar", "no file matches"),
        ("empty.tar", "no samples in 1 shard, "),
        ("pipe:cat five.tar", "is a stream"),
        ("other.tar", r"has shape \(6, 4, 4\); the model takes .*\(8, h, w\)"),
        ("wide.tar", r"t5 has shape \(77, 9\), but the UNet's context_dim is 8"),
    ],
)
def test_an_unusable_set_is_refused_in_one_line(tmp_path, monkeypatch, shard, model, urls, message):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "other.tar", members("a", (6, 4, 4)))
    wide = ("a.t5.npy", npy.encode(np.zeros((77, 9), np.float16)))
    write_tar(tmp_path / "wide.tar", [member for member in members("a") if "t5" not in member[0]] + [wide])
    with pytest.raises(UserError, match=f"^set 'new': .*{message}") as caught:
        open_set("new", urls, model)
    assert "\n" not in str(caught.value)


def test_invalid_names_and_limits_are_refused(shard, model):
    with pytest.raises(UserError, match="set 'a/b': a name consists of letters"):
        open_set("a/b", str(shard), model)
    with pytest.raises(UserError, match=r"set 1: a name consists of letters.*quote"):
        open_set(1, str(shard), model)
    with pytest.raises(UserError, match="set 'a': None names no shards"):
        open_set("a", None, model)
    with pytest.raises(UserError, match="limit 0: give a whole number of at least 1"):
        open_set("a", str(shard), model, limit=0)


def test_an_unconditional_model_is_refused(shard, make_model):
    unconditional = make_model(use_ema=False, conditioning_key=None, cond_stage_config="__is_unconditional__")
    with pytest.raises(UserError, match="only models conditioned on captions"):
        open_set("a", str(shard), unconditional)
