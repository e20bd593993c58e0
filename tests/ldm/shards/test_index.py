"""Shards are held against the index beside them, where there is one."""

import json

import pytest

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.shards.index import INDEX
from ldm.shards.verify import file_sha256
from ldm.util import UserError
from tests.ldm.shard_files import write_set


@pytest.fixture
def folder(tmp_path):
    """Three shards with their index."""
    write_set(tmp_path, 9, shards=3)
    paths = sorted(tmp_path.glob("*.tar"))
    shards = [{"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths]
    (tmp_path / INDEX).write_text(json.dumps({"complete": True, "shards": shards}))
    return tmp_path


def count(urls):
    """Return the number of samples that training would read of `urls`."""
    data = WebDataNpyModuleFromConfig(1, urls)
    data.setup("fit")
    return len(data.datasets["training"])


def test_a_whole_set_and_a_chosen_part_are_read(folder):
    assert count(str(folder)) == count(str(folder / "*.tar")) == 9
    assert count(str(folder / "set-{000..001}.tar")) == 6
    (folder / "set-002.tar").unlink()
    assert count(str(folder / "set-{000..001}.tar")) == 6


def test_an_unfinished_set_is_refused(folder):
    (folder / INDEX).write_text(json.dumps({"complete": False, "shards": []}))
    for urls in (str(folder), str(folder / "set-{000..001}.tar")):
        with pytest.raises(UserError, match=r"index\.json: the set is unfinished.*same command of tools/preencode\.py"):
            count(urls)


def test_a_missing_shard_is_told_of_where_all_are_asked_for(folder):
    (folder / "set-001.tar").unlink()
    for urls in (str(folder), f"file:{folder}", [str(folder / "set-*.tar")]):
        with pytest.raises(UserError, match=r"set-001\.tar: missing \(1 of 3 shards"):
            count(urls)


def test_shards_of_another_set_are_refused(folder):
    (folder / "set-001.tar").write_bytes((folder / "set-001.tar").read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"set-001\.tar: has \d+ bytes, but \d+ in .*index\.json"):
        count(str(folder / "set-{000..002}.tar"))
    (folder / "set-001.tar").rename(folder / "old-001.tar")
    with pytest.raises(UserError, match=r"old-001\.tar: not in .*index\.json"):
        count(str(folder))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", "[" * 100_000],
)
def test_an_index_that_is_none_is_one_line(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index\.json: (not JSON|lists no shards)"):
        count(str(folder))


@pytest.mark.parametrize(
    ("key", "values", "what"),
    [
        ("shards", (3, "s", {}, None), "not a list"),
        ("samples", (-1, 1.5, True, "3", None), "not a whole number of at least 0"),
        (
            "scale_factor",
            ("abc", {}, ["x"], True, float("nan"), float("inf"), 10**400, 0, None),
            "not a finite number above",
        ),
        ("failed", ("abc", -3, 1.5, True, {"a": 1}, ["x"], [{"name": "a"}], None), "not a list of the name and"),
        ("autoencoder", (3, "", "a\nb", {}), "not a digest"),
        ("text_tower", (3, "", True), "not a digest"),
        ("made_from", (3, None, []), "not a mapping of settings"),
    ],
)
def test_an_entry_of_the_wrong_type_is_named(folder, key, values, what):
    index = json.loads((folder / INDEX).read_text())
    for value in values:
        (folder / INDEX).write_text(json.dumps({**index, key: value}))
        with pytest.raises(UserError, match=rf"index\.json: {key} is .*, {what}.*; restore the value") as caught:
            count(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("name", (3, ["a"], "../a.tar", "a\0", "a\nb.tar", "", None)),
        ("samples", (-1, 1.5, True, "3", None)),
        ("bytes", (-1, 1.5, True, "x", None)),
        ("sha256", (3, [3], "", "0\n1", None)),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_wrong_entry_of_a_shard_is_named(folder, key, values, version):
    index = json.loads((folder / INDEX).read_text()) | {"format": version}
    for value in values:
        index["shards"][1] = {**index["shards"][0], key: value}
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(UserError, match=rf"index\.json: shards\[1\]: its {key} is .*; restore the value") as caught:
            count(str(folder))
        assert "\n" not in str(caught.value)


def test_a_shard_has_all_that_its_format_asks_for(folder):
    index = json.loads((folder / INDEX).read_text())
    for shard in (3, None, "set-000.tar"):
        (folder / INDEX).write_text(json.dumps({**index, "shards": [shard]}))
        with pytest.raises(UserError, match=r"index\.json: shards\[0\] is .*, not the name, bytes and sha256"):
            count(str(folder))
    for version, keys in ((1, ["name"]), (2, ["name", "bytes", "sha256"])):
        for key in keys:
            lacking = [{k: v for k, v in shard.items() if k != key} for shard in index["shards"]]
            (folder / INDEX).write_text(json.dumps({"format": version, "shards": lacking}))
            with pytest.raises(UserError, match=rf"index\.json: shards\[0\] has no {key}; restore the value"):
                count(str(folder))
    old = [{"name": shard["name"]} for shard in index["shards"]]
    (folder / INDEX).write_text(json.dumps({"format": 1, "shards": old}))
    assert count(str(folder)) == 9


def test_an_index_of_a_later_format_is_not_guessed_at(folder):
    index = json.loads((folder / INDEX).read_text())
    for version in (1, 2):
        (folder / INDEX).write_text(json.dumps({**index, "format": version}))
        assert count(str(folder)) == 9
    for version in (3, 0, -3, True, 1.0, "2", None):
        (folder / INDEX).write_text(json.dumps({**index, "format": version}))
        with pytest.raises(UserError, match=rf"index\.json: has format {version!r}, but this program reads 1 to 2"):
            count(str(folder))


def test_complete_is_true_or_false(folder):
    (folder / INDEX).write_text('{"complete": "no", "shards": []}')
    with pytest.raises(UserError, match=r"index\.json: complete is 'no', neither true nor false"):
        count(str(folder))


def test_shards_without_an_index_are_read(folder):
    (folder / INDEX).unlink()
    (folder / "set-000.tar").unlink()
    assert count(str(folder)) == 6
