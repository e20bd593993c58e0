"""A set that is killed anywhere and gone on with, or made by several processes, is the set that one run makes."""

import json
import multiprocessing
import os
import re
import signal

import pytest
import torch

from ldm.data.image_sources import find_images
from ldm.distributed.ranks import Ranks
from ldm.encoding import set_writer as module
from ldm.images.find import digest_images
from ldm.shards import kept_tables
from ldm.shards.index import INDEX, read_index
from ldm.shards.reader import ShardDataset
from ldm.shards.writer import Shard
from ldm.util import UserError
from tests.ldm.encoding.toy_encoder import Model, image, run
from tests.waiting import join

OPTIONS = {"shard_size": 4, "batch_size": 2, "flip": True}  # 11 images in 6 shards


@pytest.fixture
def images(tmp_path):
    """Eleven images, of which one and a whole shard cannot be read."""
    folder = tmp_path / "images"
    for number in range(11):
        image(folder / f"p{number:02d}.png", caption="x" * number)
    for number in (1, 6, 7):
        (folder / f"p{number:02d}.png").write_bytes(b"?")
    return folder


@pytest.fixture
def whole(images, tmp_path):
    """The files of the set that an uninterrupted run makes."""
    run(images, tmp_path / "whole" / "s-%d.tar", **OPTIONS)
    return contents(tmp_path / "whole")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_a_process(function, *arguments):
    """Starts `function` in a process of its own."""

    def alone():
        torch.set_num_threads(1)  # the threads of the parent are not here
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def kill_at(owner, name, count):
    """Let the `count`-th call of `owner.name` be the last thing that this process does."""
    function, calls = getattr(owner, name), []

    def last(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, last)


def killed(owner, name, count, images, out):
    kill_at(owner, name, count)
    run(images, out, **OPTIONS)


@pytest.mark.parametrize(
    ("owner", "name", "count", "finished"),
    [
        (Shard, "write", 1, 0),  # nothing written but the mark
        (Shard, "write", 4, 1),  # in the middle of the second shard
        (module, "write_record", 2, 1),  # the second shard is there, but nothing says so
        (module, "write_record", 5, 4),  # behind the shard of which nothing can be read
        (module, "finish", 1, 6),  # all but the index
    ],
)
def test_the_same_command_goes_on_after_a_kill(images, whole, tmp_path, owner, name, count, finished):
    out = tmp_path / "out" / "s-%d.tar"
    process = in_a_process(killed, owner, name, count, images, out)
    join(process)
    assert process.exitcode == -signal.SIGKILL
    assert not read_index(out.parent)["complete"]
    assert len(list((out.parent / ".parts").glob("*"))) == finished
    _, model = run(images, out, **OPTIONS)
    assert contents_without_leftovers(out.parent) == whole
    views = [2, 4, 4, 0, 4, 2]  # of each shard; a shard that was finished is not encoded again
    assert sum(model.first_stage_model.calls) == sum(views[finished:])


def contents_without_leftovers(folder):
    """What is in `folder`, without hidden files: what was half written, which a later write of it removes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


@pytest.fixture
def unfinished(images, tmp_path):
    """The pattern of a set of which four shards are there."""
    out = tmp_path / "out" / "s-%d.tar"
    join(in_a_process(killed, module, "write_record", 5, images, out))
    return out


def test_a_finished_shard_that_changed_is_made_again(images, whole, unfinished, caplog):
    data = bytearray((unfinished.parent / "s-1.tar").read_bytes())
    data[700] ^= 1
    (unfinished.parent / "s-1.tar").write_bytes(data)
    (unfinished.parent / "s-2.tar").unlink()
    _, model = run(images, unfinished, **OPTIONS)
    assert contents_without_leftovers(unfinished.parent) == whole
    assert sum(model.first_stage_model.calls) == 4 + 4 + 4 + 2
    assert "s-1.tar: differs from its record" in caplog.text and "s-2.tar: differs from" in caplog.text


def test_another_command_does_not_go_on(images, unfinished, tmp_path):
    before = contents_without_leftovers(unfinished.parent)
    for message, options in (
        ("size 16, this command has 32", {"size": 32}),
        ("shard_size 4, this command has 2", {"shard_size": 2}),
    ):
        with pytest.raises(UserError, match=f"index.json: the unfinished set was begun with {message}; give the same"):
            run(images, unfinished, **{**OPTIONS, **options})
    (images / "p03.txt").write_text("another caption")
    with pytest.raises(UserError, match="begun with images"):
        run(images, unfinished, **OPTIONS)
    assert contents_without_leftovers(unfinished.parent) == before
    run(images, unfinished, overwrite=True, **OPTIONS)
    assert read_index(unfinished.parent)["complete"] and not (unfinished.parent / ".parts").exists()


def test_other_weights_do_not_go_on(images, unfinished):
    model = Model()
    model.first_stage_model.weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match=r"begun with autoencoder None, this command has [0-9a-f]{64}"):
        run(images, unfinished, model, **OPTIONS)


def test_a_set_that_does_not_say_what_it_is_made_from_is_left_alone(images, unfinished):
    index = read_index(unfinished.parent)
    del index["made_from"]
    (unfinished.parent / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="the unfinished set has no made_from"):
        run(images, unfinished, **OPTIONS)


def one_of(rank, world, images, out):
    run(images, out, **OPTIONS, ranks=Ranks(rank, world))


@pytest.mark.parametrize("world", [2, 8])
def test_several_processes_make_the_same_set(images, whole, tmp_path, world):
    out = tmp_path / "out" / "s-%d.tar"
    others = [in_a_process(one_of, rank, world, images, out) for rank in range(1, world)]
    report, model = run(images, out, **OPTIONS, ranks=Ranks(0, world))
    assert join(*others) == [0] * len(others)
    assert contents(out.parent) == whole
    assert report.samples == 16 and sum(model.first_stage_model.calls) < 16  # rank 0 encoded its share alone


def test_a_process_that_was_killed_is_waited_for(images, whole, tmp_path):
    out = tmp_path / "out" / "s-%d.tar"
    first = in_a_process(one_of, 0, 2, images, out)

    def dies():
        kill_at(Shard, "write", 2)
        one_of(1, 2, images, out)

    second = in_a_process(dies)
    join(second)
    assert second.exitcode == -signal.SIGKILL and not read_index(out.parent)["complete"]
    one_of(1, 2, images, out)  # started again
    join(first)
    assert first.exitcode == 0
    assert contents_without_leftovers(out.parent) == whole
    report, model = run(images, out, **OPTIONS, ranks=Ranks(1, 2))  # started after all was done
    assert report.samples == 0 and model.first_stage_model.calls == []


def test_images_are_told_apart_by_what_is_known_of_them(images):
    first = digest_images(find_images(images))
    assert digest_images(find_images(images)) == first and re.fullmatch("[0-9a-f]{64}", first)
    (images / "p03.png").write_bytes(b"??")
    changed = digest_images(find_images(images))
    (images / "p03.txt").write_text("y")
    assert len({first, changed, digest_images(find_images(images)), digest_images(find_images(images, "z"))}) == 4


def test_the_tables_of_a_finished_set_are_kept_for_the_first_start(images, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_tables, "LEAST_SAMPLES", 1)
    run(images, tmp_path / "set" / "s-%d.tar", **OPTIONS)
    monkeypatch.setattr(kept_tables, "build_table", None)
    dataset = ShardDataset(sorted((tmp_path / "set").glob("*.tar")), cond_stage_key="txt")
    assert len(dataset) == read_index(tmp_path / "set")["samples"]
