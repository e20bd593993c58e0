import logging
from pathlib import Path

import pytest

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.stream import ShardStream
from ldm.util import UserError
from tests.ldm.shard_files import sample_members, write_set, write_tar


def piped(pattern: str) -> str:
    return f"pipe:cat {pattern}"


def keys(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return [key for batch in loader for key in batch["__key__"]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_sample_once_whatever_the_workers(tmp_path, num_workers, caplog):
    pattern = piped(write_set(tmp_path, 10))
    with caplog.at_level(logging.INFO):
        data = WebDataNpyModuleFromConfig(4, pattern, num_workers=num_workers, seed=1)
        data.setup("fit")
    assert "streamed from 2 shards, f8 8x4x4 float16" in caplog.text
    loader = data.train_dataloader()
    first, second = keys(loader, 0), keys(loader, 1)
    assert sorted(first) == sorted(second) == [f"{n:06d}" for n in range(10)]
    assert first != second
    assert keys(loader, 0) == first


def test_ranks_split_the_shards(tmp_path):
    urls = [piped(path) for path in sorted(map(str, Path(write_set(tmp_path, 10, shards=5)).parent.glob("*.tar")))]
    ranks = [[sample["__key__"] for sample in ShardStream(urls, rank=rank, world=2)] for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == [f"{n:06d}" for n in range(10)]
    assert len(ranks[0]) == 6


def test_captions_are_dropped(tmp_path):
    pattern = piped(write_set(tmp_path, 40))
    null = str(tmp_path / "null.t5.npy")
    data = WebDataNpyModuleFromConfig(40, pattern, null_cond_dropout=0.5, null_cond_path=null, seed=0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert 8 < sum(bool((t5 == -1).all()) for t5 in batch["t5"]) < 32
    data.null_cond_path = None
    with pytest.raises(UserError, match="null_cond_path"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample_members(0)[:1], r"a\.tar: sample '000000' has no member 't5\.npy'"),
        ([(f"../{name}", data) for name, data in sample_members(0)], "points outside"),
        (sample_members(0) + sample_members(1, f8_shape=(4, 4, 4)), r"000001\.f8\.npy: shape"),
    ],
)
def test_samples_that_do_not_fit_are_named(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        list(ShardStream([piped(str(path))]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_command_that_fails_is_one_line(tmp_path, num_workers):
    data = WebDataNpyModuleFromConfig(4, f"pipe:cat {tmp_path}/none.tar", num_workers=num_workers)
    with pytest.raises(UserError, match=r"none\.tar: cannot be read") as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)


def test_a_stream_cut_short_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample_members(0) + sample_members(1))
    with pytest.raises(UserError, match="cannot be read"):
        list(ShardStream([f"pipe:head -c 5000 {path}"]))


def test_too_few_shards_for_the_ranks_and_empty_ones_are_errors(tmp_path):
    with pytest.raises(UserError, match="1 streamed shards are too few for 2 ranks"):
        ShardStream(["pipe:cat a.tar"], rank=1, world=2)
    with pytest.raises(UserError, match="no samples"):
        WebDataNpyModuleFromConfig(4, piped(str(write_tar(tmp_path / "a.tar", [])))).setup("fit")
