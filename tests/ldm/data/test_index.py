"""Shards are held against the index beside them, where there is one."""

import json

import pytest

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.index import INDEX
from ldm.util import UserError
from tests.ldm.data.shard_files import write_set


@pytest.fixture
def folder(tmp_path):
    """Three shards with their index."""
    write_set(tmp_path, 9, shards=3)
    shards = [{"name": path.name, "bytes": path.stat().st_size} for path in sorted(tmp_path.glob("*.tar"))]
    (tmp_path / INDEX).write_text(json.dumps({"complete": True, "shards": shards}))
    return tmp_path


def count(urls):
    """The number of samples that training would read of `urls`."""
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
        with pytest.raises(UserError, match=r"set-001\.tar: missing, as 1 of the 3 shards"):
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
    ["{", "[]", "{}", '{"shards": [1]}', "[" * 100_000]
    + [f'{{"shards": [{{"name": {name}}}]}}' for name in ("3", '["a"]', '"../a.tar"', '"a\\u0000"', "null")],
)
def test_an_index_that_is_none_is_one_line(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index\.json: (not JSON|lists no shards)"):
        count(str(folder))


def test_an_index_of_a_later_format_is_not_guessed_at(folder):
    index = json.loads((folder / INDEX).read_text())
    for version in (1, 2):
        (folder / INDEX).write_text(json.dumps({**index, "format": version}))
        assert count(str(folder)) == 9
    (folder / INDEX).write_text(json.dumps({**index, "format": 3}))
    with pytest.raises(UserError, match=r"index\.json: has format 3, this program knows 1 to 2"):
        count(str(folder))


def test_complete_is_true_or_false(folder):
    (folder / INDEX).write_text('{"complete": "no", "shards": []}')
    with pytest.raises(UserError, match=r"index\.json: complete is 'no', neither true nor false"):
        count(str(folder))


def test_shards_without_an_index_are_read(folder):
    (folder / INDEX).unlink()
    (folder / "set-000.tar").unlink()
    assert count(str(folder)) == 6
