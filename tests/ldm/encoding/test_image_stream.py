"""Images that are read while they are encoded are those that are found first, and make the same set."""

from __future__ import annotations

import json
import logging
import signal
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ldm.data.image_sources import find_images
from ldm.distributed.ranks import Ranks
from ldm.encoding import image_stream
from ldm.encoding import set_writer as module
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.image_stream import open_images
from ldm.encoding.preencode import preencode
from ldm.images.repeats import FolderRepeats
from ldm.images.tags import with_tag_variants
from ldm.shards.index import read_index
from ldm.shards.writer import Shard
from ldm.util import UserError
from tests.ldm.encoding.image_trees import (
    assert_refused_alike,
    compare,
    png,
    write_links,
    write_list,
    write_lists,
    write_pairs_and_masks,
    write_tar,
    write_tars,
    write_tree,
)
from tests.ldm.encoding.test_set_writer import contents, contents_without_leftovers, in_a_process, kill_at
from tests.ldm.encoding.toy_encoder import Model, image, run
from tests.waiting import join

OPTIONS = {"shard_size": 4, "batch_size": 2, "flip": True, "stream": True}  # two images per shard


@pytest.mark.parametrize("options", [{}, {"caption": "a  cat"}, {"several": True}], ids=str)
def test_a_folder_gives_the_same_images_and_warnings(tmp_path: Path, caplog, options: dict) -> None:
    assert compare(caplog, [write_tree(tmp_path)], **options) == 12


def test_the_number_of_images_of_a_folder_is_known(tmp_path: Path) -> None:
    assert open_images([str(write_tree(tmp_path))]).count == "12 images"


@pytest.mark.parametrize("options", [{}, {"caption": "a cat"}, {"several": True}], ids=str)
def test_tars_give_the_same_images_and_warnings(tmp_path: Path, caplog, options: dict) -> None:
    folder, other = write_tars(tmp_path / "one"), write_tars(tmp_path / "two", 1)
    assert compare(caplog, [folder], **options) == 9
    assert compare(caplog, [folder, other], **options) == 12
    assert compare(caplog, [folder / "*.tar"], **options) == 9
    assert compare(caplog, [folder / "{00000,00002}.tar", other / "00000.tar"], **options) == 9


def test_tars_of_pairs_and_of_masks_give_the_same_images(tmp_path: Path, caplog) -> None:
    write_tar(tmp_path / "0.tar", {"a.png": png(), "a.txt": b"make it red", "b.png": png(), "b.txt": b"blue"})
    write_tar(tmp_path / "1.tar", {"c.png": png(), "c.edited.png": png("blue"), "c.mask.png": png(), "c.txt": b"blue"})
    assert compare(caplog, [tmp_path], pairs=True) == compare(caplog, [tmp_path], masks=True) == 3


@pytest.mark.parametrize(
    ("members", "options"),
    [
        ({"a.png": png()}, {}),
        ({"a.png": png(), "a.txt": b"x"}, {"pairs": True}),
        ({"a.png": png(), "a.txt": b"x"}, {"masks": True}),
        ({"a.txt": b"x"}, {"pairs": True}),
    ],
    ids=["captions", "pairs", "masks", "images"],
)
def test_sources_that_lack_something_are_refused_before_the_first_shard(tmp_path: Path, members, options) -> None:
    write_tar(tmp_path / "0.tar", members)
    assert_refused_alike(tmp_path, **options)


def test_a_tar_in_two_sources_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path)
    with pytest.raises(UserError, match=r"00001\.tar: occurs twice among the images"):
        open_images([str(tmp_path), str(tmp_path / "00001.tar")])


@pytest.mark.parametrize("options", [{}, {"caption": "a  cat"}, {"several": True}], ids=str)
@pytest.mark.parametrize("write", [write_list, write_lists, write_links])
def test_folders_with_lists_or_links_give_the_same_images_and_warnings(tmp_path: Path, caplog, write, options) -> None:
    expected = {write_list: 8, write_lists: 22, write_links: 15}
    assert compare(caplog, [write(tmp_path / "in")], **options) == expected[write]
    assert open_images([str(tmp_path / "in")]).count == f"{expected[write]} images"


def test_a_list_in_utf_16_and_one_with_lists_of_captions_give_the_same_images(tmp_path: Path, caplog) -> None:
    (tmp_path / "é.png").write_bytes(png())
    entries = [{"file_name": "é.png", "text": ["one", "two"]}, {"file_name": "missing.png", "text": "a\u2028b"}]
    text = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    for encoding in ("utf-16", "utf-8-sig", "utf-8"):
        (tmp_path / "metadata.jsonl").write_text(text, encoding=encoding)
        assert compare(caplog, [tmp_path], several=True) == 2


def test_several_folders_and_tars_give_the_same_images_and_warnings(tmp_path: Path, caplog, monkeypatch) -> None:
    sources = [write_lists(tmp_path / "lists"), write_tars(tmp_path / "tars"), write_list(tmp_path / "list")]
    (tmp_path / "lists/a/link.png").unlink()
    assert compare(caplog, sources) == 21 + 9 + 8
    assert compare(caplog, [*sources[1:], tmp_path / "lists/a/b"], caption="a") == 9 + 8 + 2
    monkeypatch.chdir(tmp_path / "list")
    assert compare(caplog, [Path(), sources[1]]) == 8 + 9  # "." has no name
    assert open_images(list(map(str, sources))).count == "29 images and images of 3 tars"


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a/x.png", "text": "again"}',
        '{"file_name": "./b//IMG.PNG"}',
        '{"file_name": "../x.png"}',
        '{"file_name": "a.png", "text": 3}',
        "[]",
        "{",
        "\udcff",
    ],
)
def test_wrong_lists_are_refused_before_the_first_shard(tmp_path: Path, line: str) -> None:
    with (write_list(tmp_path) / "metadata.jsonl").open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line)
    assert_refused_alike(tmp_path)


def peak_of_listing(folder: Path, count: int) -> int:
    """Return the peak of memory in bytes while a stream of `count` listed images is read."""
    folder.mkdir()
    (folder / "0.png").write_bytes(png())
    lines = (f'{{"file_name": "{number}.png", "text": "{"x" * 200}"}}\n' for number in range(count))
    (folder / "metadata.jsonl").write_text("".join(lines))
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_images([str(folder)])) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_stream_of_listed_images_takes_a_few_bytes_for_each(tmp_path: Path) -> None:
    few, many = (peak_of_listing(tmp_path / str(count), count) for count in (500, 5500))
    assert (many - few) / 5000 < 64


def _tar(folder: Path) -> None:
    write_tar(write_tree(folder) / "b/c/x.tar", {"a.png": png()})


def _list_in_a_list(folder: Path) -> None:
    (write_list(folder) / "b/c/metadata.csv").write_text("file_name,text\n")


def _list_and_link(folder: Path) -> None:
    (write_list(folder) / "link").symlink_to(folder / "b")


def _list_and_unreadable_image(folder: Path) -> None:
    (write_list(folder) / "gone.png").symlink_to("nowhere")


@pytest.mark.parametrize("write", [_tar, _list_in_a_list, _list_and_link, _list_and_unreadable_image])
def test_other_folders_are_read_as_a_whole(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    assert open_images([str(tmp_path)]) is None


def test_masks_and_pairs_of_lists_or_several_folders_and_single_images_are_read_as_a_whole(tmp_path: Path) -> None:
    one, other = str(write_tree(tmp_path / "one")), str(write_list(tmp_path / "other"))
    for options in ({"pairs": True}, {"masks": True}):
        for sources in ([other], [one, f"{other}/a"], [f"{one}/b.png"]):
            assert open_images(sources, **options) is None
    assert open_images([one], pairs=True) is None and open_images([f"{one}/b.png"]) is None


@pytest.mark.parametrize("options", [{"pairs": True}, {"masks": True}, {"pairs": True, "masks": True}], ids=str)
@pytest.mark.parametrize("more", [{}, {"caption": "a cat"}], ids=str)
def test_pairs_and_masks_of_a_folder_give_the_same_images_and_warnings(tmp_path: Path, caplog, options, more) -> None:
    assert compare(caplog, [write_pairs_and_masks(tmp_path)], **options, **more) > 8


def test_masks_of_a_folder_with_links_and_unreadable_images_give_the_same_images(tmp_path: Path, caplog) -> None:
    folder = write_links(tmp_path / "in")
    (folder / "gone.mask.png").symlink_to("nowhere")
    assert compare(caplog, [folder], masks=True) == 14


def test_masks_of_a_folder_make_the_same_set(tmp_path: Path) -> None:
    folder, options = write_pairs_and_masks(tmp_path / "in"), {**OPTIONS, "loss_masks": True}
    run(folder, tmp_path / "whole" / "s-%d.tar", **{**options, "stream": False})
    run(folder, tmp_path / "out" / "s-%d.tar", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"pairs": True}, {"masks": True}], ids=str)
def test_folders_without_pairs_or_masks_are_refused_before_the_first_shard(tmp_path: Path, options: dict) -> None:
    image(tmp_path / "a.png")
    for count in (1, 150):
        for number in range(1, count):
            (tmp_path / f"{number}.png").hardlink_to(tmp_path / "a.png")
        assert_refused_alike(tmp_path, **options)


def test_folders_that_may_have_an_image_in_common_are_read_as_a_whole(tmp_path: Path) -> None:
    folder, other = write_list(tmp_path / "one"), write_list(tmp_path / "two")
    assert open_images([str(folder), f"{folder}/a"]) is None and open_images([str(folder)] * 2) is None
    assert open_images([str(folder), str(other)]) is not None
    (other / "link.png").symlink_to(folder / "b.png")
    assert open_images([str(other)]) is not None and open_images([str(folder), str(other)]) is None


@pytest.fixture(params=[write_tars, write_tree, write_lists, write_links])
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "inputs")


@pytest.fixture
def whole(inputs: Path, tmp_path: Path) -> dict[str, bytes]:
    """Return the files of the set that a list of images makes."""
    run(inputs, tmp_path / "whole" / "s-%d.tar", **{**OPTIONS, "stream": False})
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_makes_the_same_set(inputs: Path, whole, tmp_path: Path, workers: int) -> None:
    run(inputs, tmp_path / "out" / "s-%d.tar", workers=workers, **OPTIONS)
    assert contents(tmp_path / "out") == whole


def killed(name: str, count: int, inputs: Path, out: Path) -> None:
    kill_at(Shard if name == "write" else module, name, count)
    run(inputs, out, **OPTIONS)


@pytest.mark.parametrize(("name", "count"), [("write", 1), ("write", 4), ("write_record", 3), ("finish", 1)])
def test_a_stream_resumes_after_a_kill(inputs: Path, whole, tmp_path: Path, name: str, count: int) -> None:
    out = tmp_path / "out" / "s-%d.tar"
    assert join(in_a_process(killed, name, count, inputs, out)) == [-signal.SIGKILL]
    finished = len(list((out.parent / ".parts").glob("*")))
    _, model = run(inputs, out, **OPTIONS)
    assert contents_without_leftovers(out.parent) == whole
    if name == "finish":
        assert model.first_stage_model.calls == [] and finished > 3


def test_other_images_do_not_resume(inputs: Path, whole, tmp_path: Path) -> None:
    out = tmp_path / "out" / "s-%d.tar"
    join(in_a_process(killed, "finish", 1, inputs, out))
    before = contents_without_leftovers(out.parent)
    with pytest.raises(UserError, match="begun with size 16, this command has 32"):
        run(inputs, out, **OPTIONS, size=32)
    with pytest.raises(UserError, match=r"s-0\.tar: the unfinished set was begun with other images or captions"):
        run(inputs, out, caption="another", **OPTIONS)
    if (inputs / "00002.tar").exists():
        (inputs / "00002.tar").rename(tmp_path / "00002.tar")
        with pytest.raises(UserError, match=r"s-\d\.tar: the unfinished set was begun with (more|other) images"):
            run(inputs, out, **OPTIONS)
        (tmp_path / "00002.tar").rename(inputs / "00002.tar")
    assert contents_without_leftovers(out.parent) == before
    run(inputs, out, **OPTIONS)
    assert contents_without_leftovers(out.parent) == whole


def one_of(rank: int, world: int, inputs: Path, out: Path) -> None:
    run(inputs, out, **OPTIONS, ranks=Ranks(rank, world))


@pytest.mark.parametrize("world", [2, 8])
def test_several_processes_make_the_same_set_of_a_stream(inputs: Path, whole, tmp_path: Path, world: int) -> None:
    out = tmp_path / "out" / "s-%d.tar"
    others = [in_a_process(one_of, rank, world, inputs, out) for rank in range(1, world)]
    report, _ = run(inputs, out, **OPTIONS, ranks=Ranks(0, world))
    assert join(*others) == [0] * len(others)
    assert contents(out.parent) == whole and report.samples == read_index(out.parent)["samples"]
    report, model = run(inputs, out, **OPTIONS, ranks=Ranks(1, world))  # started after all was done
    assert report.samples == 0 and model.first_stage_model.calls == []


def test_later_tars_are_read_after_the_first_shard(tmp_path: Path) -> None:
    """A damaged tar is refused when its turn comes. Once it is mended, the same command continues."""
    inputs, out = write_tars(tmp_path / "inputs", count=6), tmp_path / "out" / "s-%d.tar"
    run(inputs, tmp_path / "whole" / "s-%d.tar", **OPTIONS)
    data = (inputs / "00005.tar").read_bytes()
    (inputs / "00005.tar").write_bytes(data[:700])
    with pytest.raises(UserError, match=r"00005\.tar: truncated or damaged"):
        run(inputs, out, **OPTIONS)
    assert (out.parent / "s-0.tar").exists() and not read_index(out.parent)["complete"]
    (inputs / "00005.tar").write_bytes(data)
    run(inputs, out, **OPTIONS)
    assert contents_without_leftovers(out.parent) == contents(tmp_path / "whole")


def test_the_first_image_is_there_when_one_tar_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = image_stream.from_tar, []
    monkeypatch.setattr(image_stream, "from_tar", lambda path, *rest: names.append(path.name) or read(path, *rest))
    next(iter(open_images([str(write_tars(tmp_path))])))
    assert names == ["00000.tar"]


def test_repeats_and_variants_of_tags_make_the_same_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    inputs, tags = write_tree(tmp_path / "inputs"), partial(with_tag_variants, count=3)
    (inputs / "a.b/x.png.txt").write_text("tom, cat, red, sofa")
    repeats = FolderRepeats()
    items = [repeats.of(tags(item)) for item in find_images([str(inputs)], several=True)]
    stream = open_images([str(inputs)], None, False, True, False, [tags], FolderRepeats(), may_have_several=True)
    assert stream.has_several
    for images, out in ((items, "listed"), (stream, "streamed")):
        preencode(SampleEncoder(Model()), images, str(tmp_path / out / "%d.tar"), size=16, batch_size=2, shard_size=3)
    assert contents(tmp_path / "listed") == contents(tmp_path / "streamed")
    assert read_index(tmp_path / "streamed")["made_from"]["repeats"] is True
    assert caplog.text.count("3_c: 1 image, each 3 times per epoch") == 1
