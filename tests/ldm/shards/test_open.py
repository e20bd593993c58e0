"""A set is opened in one way: what its index says is checked first, and what made it on request."""

import json

import pytest

from ldm.shards.index import INDEX, write_index
from ldm.shards.open import check_encoders, open_shards
from ldm.util import UserError
from tests.ldm.shard_files import write_set

OWN = {"autoencoder": "a" * 64, "text_tower": "b" * 64}


@pytest.fixture
def folder(tmp_path):
    """Two shards of four samples with an index that says what made them."""
    write_set(tmp_path, 4)
    shards = [{"name": path.name, "sha256": "0" * 64} for path in sorted(tmp_path.glob("*.tar"))]
    write_index(tmp_path, {"complete": True, "shards": shards, **OWN})
    return tmp_path


def change(folder, **entries):
    write_index(folder, {**json.loads((folder / INDEX).read_text()), **entries})


def test_a_set_is_read_as_asked_for(folder):
    dataset = open_shards(str(folder), "f8", None, ["json"], verify=False)
    assert len(dataset) == 4 and dataset.keys == ["f8", "txt", "json"]
    with pytest.raises(UserError, match=r"set-000\.tar: was changed"):
        open_shards(str(folder))


def test_what_is_wrong_is_told_before_any_shard_is_read(folder, monkeypatch):
    monkeypatch.setattr("ldm.shards.open.verify_shards", lambda paths: pytest.fail("read"))
    for urls, message in (
        ([str(folder / "set-000.tar"), "pipe:cat x"], "pipe:cat x: is a stream; give local shards"),
        (str(folder / "set-{000..002}.tar"), r"set-002\.tar: no such file"),
        (str(folder / "other-*.tar"), "no file matches"),
    ):
        with pytest.raises(UserError, match=message):
            open_shards(urls)
    (folder / "set-001.tar").unlink()
    for urls in (str(folder), str(folder / "set-{000..001}.tar"), [str(folder / "set-001.tar")]):
        with pytest.raises(UserError, match=r"set-001\.tar: missing \(1 of 2 shards in index\.json\)"):
            open_shards(urls)
    assert len(open_shards(str(folder / "set-000.tar"), verify=False)) == 2


def test_an_unfinished_set_can_be_asked_for(folder, caplog):
    change(folder, complete=False, shards=[])
    with pytest.raises(UserError, match="the set is unfinished"):
        open_shards(str(folder))
    assert not caplog.records
    assert len(open_shards(str(folder), unfinished=True)) == 4
    assert "index.json: the set is unfinished" in caplog.text


def test_a_set_of_other_encoders_is_refused(folder):
    captions, encodings = (open_shards(str(folder), cond_stage_key=key, verify=False) for key in ("txt", "t5"))
    for dataset in (captions, encodings):
        check_encoders(dataset, OWN, "x.ckpt")
        for unknown in ({}, {"autoencoder": None, "text_tower": None}):
            check_encoders(dataset, unknown, "x.ckpt")
        with pytest.raises(UserError, match=r"index\.json: .* by another autoencoder \(a{12}…\) than that"):
            check_encoders(dataset, {**OWN, "autoencoder": "c" * 64}, "x.ckpt")
    other = {**OWN, "text_tower": "c" * 64}
    check_encoders(captions, other, "x.ckpt")
    with pytest.raises(UserError, match=r"another text tower \(b{12}…\) than that of x\.ckpt \(c{12}…\); try another$"):
        check_encoders(encodings, other, "x.ckpt", "try another")
    change(folder, text_tower_2="d" * 64)
    check_encoders(captions, {**OWN, "text_tower_2": "e" * 64}, "x.ckpt")
    with pytest.raises(UserError, match=r"another second text tower \(d{12}…\) than that of x\.ckpt \(e{12}…\)"):
        check_encoders(encodings, {**OWN, "text_tower_2": "e" * 64}, "x.ckpt")
    change(folder, autoencoder=None, text_tower=None)
    check_encoders(encodings, other, "x.ckpt")
    (folder / INDEX).unlink()
    check_encoders(encodings, other, "x.ckpt")


@pytest.mark.parametrize(("key", "value"), [("autoencoder", 3), ("text_tower", "a\nb"), ("autoencoder", "")])
def test_digests_that_are_none_are_refused(folder, key, value):
    change(folder, **{key: value})
    with pytest.raises(UserError, match=f"index.json: {key} is .*, not a digest") as caught:
        open_shards(str(folder))
    assert "\n" not in str(caught.value)
