import hashlib
import tarfile
from contextlib import nullcontext

import pytest

from ldm.shards.tar import index_tar
from ldm.shards.writer import ShardWriter, existing_shards, is_spread, shard_paths
from ldm.util import UserError


def write(pattern, count, size):
    with ShardWriter(str(pattern), size) as writer:
        for number in range(count):
            writer.write(f"{number:03d}", {"txt": b"x" * number, "f8.npy": b"y"})
    return writer.shards


@pytest.mark.parametrize("name", ["a-%02d.tar", "a-{00..02}.tar"])
def test_samples_are_spread_over_shards(tmp_path, name):
    shards = write(tmp_path / name, 5, 2)
    assert [(shard["name"], shard["samples"]) for shard in shards] == [
        ("a-00.tar", 2),
        ("a-01.tar", 2),
        ("a-02.tar", 1),
    ]
    assert [sample.key for shard in shards for sample in index_tar(tmp_path / shard["name"])] == [
        f"{number:03d}" for number in range(5)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard["name"] for shard in shards]
    for shard in shards:
        assert shard["sha256"] == hashlib.sha256((tmp_path / shard["name"]).read_bytes()).hexdigest()
    assert existing_shards(str(tmp_path / name)) == sorted(tmp_path.iterdir())


def test_a_single_name_takes_everything(tmp_path):
    assert [shard["samples"] for shard in write(tmp_path / "a.tar", 5, 2)] == [5]


def test_the_same_samples_make_the_same_bytes(tmp_path):
    first, second = write(tmp_path / "a" / "%d.tar", 4, 3), write(tmp_path / "b" / "%d.tar", 4, 3)
    assert first == second
    with tarfile.open(tmp_path / "a" / "0.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


def test_an_error_leaves_whole_shards_only(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(str(tmp_path / "%d.tar"), 2) as writer:
        for number in range(3):
            writer.write(str(number), {"txt": b"x"})
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


@pytest.mark.parametrize("pattern", ["shards", "a-%d-%d.tar", "a-{0..2.tar"])
def test_patterns_that_make_no_sense(pattern):
    with pytest.raises(UserError, match="--out"):
        shard_paths(pattern)


def test_too_few_names(tmp_path):
    with pytest.raises(UserError, match="2 shards of 2 samples are too few"):
        write(tmp_path / "{0..1}.tar", 5, 2)


@pytest.mark.parametrize("out", ["x/{p,q}/c.tar", "x/%d/c.tar", "{0..1}/c-%d.tar", "x/%02d/{a,b}.tar"])
def test_shard_paths_of_several_folders_are_refused(tmp_path, out):
    with pytest.raises(UserError, match=r"a set needs one folder, but .* stands for several"):
        shard_paths(f"{tmp_path}/{out}")
    (tmp_path / out).parent.mkdir(parents=True)
    assert next(shard_paths(f"{tmp_path}/{out}")).parent == (tmp_path / out).parent


@pytest.mark.parametrize("name", ["c{a,b}.tar", "c-%03d.tar", "c{0..3}.tar"])
def test_shard_paths_takes_a_file_that_exists_literally(tmp_path, name):
    assert is_spread(str(tmp_path / name))
    (tmp_path / name).touch()
    assert not is_spread(str(tmp_path / name))
    assert list(shard_paths(str(tmp_path / name))) == existing_shards(str(tmp_path / name)) == [tmp_path / name]


@pytest.mark.parametrize(
    ("name", "message"),
    [("c{x,x}.tar", r"names cx\.tar twice"), ("c{.tar,}.tar", None), ("{a,b.tar", "Unbalanced braces")],
)
def test_shard_paths_holds_names_to_shards_of_the_folder(tmp_path, name, message):
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        shard_paths(f"{tmp_path}/{name}")


def test_shard_paths_in_folders_with_the_characters_of_patterns(tmp_path):
    for folder in ("fruit [2]", "fruit {2}", "50%", "open {"):
        paths = shard_paths(f"{tmp_path}/{folder}/c-%d.tar")
        assert [next(paths), next(paths)] == [tmp_path / folder / "c-0.tar", tmp_path / folder / "c-1.tar"]
