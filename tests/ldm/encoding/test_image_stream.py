"""Images that are read while they are encoded are those that are found first, and make the same set."""

from __future__ import annotations

import io
import json
import logging
import signal
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.sources import find_images
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
from tests.ldm.encoding.test_set_writer import contents, contents_without_leftovers, in_a_process, kill_at
from tests.ldm.encoding.toy_encoder import Model, image, run
from tests.waiting import join

OPTIONS = {"shard_size": 4, "batch_size": 2, "flip": True, "stream": True}  # two images per shard


def png(colour: str = "red", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (20, 16), colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, count: int = 3, each: int = 3) -> Path:
    """Write tars as img2dataset does, of which one image is damaged and one has no caption."""
    for tar in range(count):
        members = {}
        for number in range(tar * each, (tar + 1) * each):
            members[f"{number:04d}.png"] = b"?" if number == 1 else png()
            members |= {} if number == 2 else {f"{number:04d}.txt": b"x" * number + b" "}
            members[f"{number:04d}.json"] = b"{}"
        write_tar(folder / f"{tar:05d}.tar", members)
    (folder / "00000.parquet").write_bytes(b"")
    return folder


def write_tree(folder: Path) -> Path:
    """Write folders of images with all that a folder may have, except for what is read as a whole."""
    for name in ("b/a.png", "b.png", "b/c/a.JPG", "a.b/x.png", "a/x.png", "a/é.png", "3_c/y.webp", "z.gif", "z.heic"):
        image(folder / "tmp.png", caption=None)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tmp.png").rename(folder / name)
    for name in ("b/a.txt", "b.caption", "a.b/x.png.txt", "3_c/y.txt", "a/e\u0301.txt", "alone.txt", "b/alone2.txt"):
        (folder / name).write_text(f"caption of {name}")
    (folder / "z.txt").write_bytes(b"\xff\xff")
    (folder / "b.json").write_text("{}")
    (folder / "b/c/notes.doc").write_text("x")
    (folder / "a.mask.png").write_bytes(png())
    (folder / ".hidden.png").write_bytes(png())
    (folder / ".git").mkdir()
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "link.png").symlink_to("b.png")
    (folder / "loop").symlink_to("loop")
    return folder


def compare(caplog: pytest.LogCaptureFixture, sources: list[Path], **options: object) -> int:
    """Assert that a stream has the items and warnings of a list. Return the number of images."""
    caplog.set_level(logging.WARNING)
    names = list(map(str, sources))
    caplog.clear()
    expected = find_images(names, **options)
    said = sorted(caplog.messages)
    caplog.clear()
    stream = open_images(names, **options)
    assert stream is not None and list(stream) == expected and sorted(caplog.messages) == said
    assert list(stream) == expected, "another iteration reads them again"
    return len(expected)


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
    with pytest.raises(UserError) as expected:
        find_images([str(tmp_path)], **options)
    with pytest.raises(UserError) as found:
        open_images([str(tmp_path)], **options)
    assert str(found.value) == str(expected.value)


def test_a_tar_in_two_sources_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path)
    with pytest.raises(UserError, match=r"00001\.tar: occurs twice among the images"):
        open_images([str(tmp_path), str(tmp_path / "00001.tar")])


def write_list(folder: Path) -> Path:
    """Write a tree whose metadata file lists images in an order of its own, and not all of them."""
    write_tree(folder)
    for path in ("gone.png", "loop", "link.png"):
        (folder / path).unlink()
    for name in ("b/IMG.PNG", "b/unlisted.png", "other.png", "c/none.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png("blue"))
    names = ["b/IMG.png", "b.png", "a/e\u0301.png", "missing.png", ".git/hidden.png", "z.gif", "a/x.png", "b/c/a.jpg"]
    captions = [None, "b", "e", "m", "h", None, " a  x ", "c"]
    (folder / "b/IMG.txt").write_text("a text file")
    (folder / ".git/hidden.png").write_bytes(png())
    entries = [{"file_name": name, "text": text, "odd": 1} for name, text in zip(names, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    (folder / "metadata.csv").write_text("file_name,text\n")
    return folder


def write_lists(folder: Path) -> Path:
    """Write folders of which two have a metadata file and one has none."""
    write_list(folder / "m")
    write_tree(folder / "a")
    (folder / "z").mkdir()
    for name in ("2", "10", "1"):
        (folder / f"z/{name}.png").write_bytes(png())
    lines = ["file,caption", "2.png,two", "10.png,", '1.png,"one, and']
    (folder / "z/metadata.csv").write_text("\r\n".join(lines) + '\r\nonly"\r\n')
    for path in folder.glob("a/*"):
        if path.is_symlink() and not path.exists():
            path.unlink()
    (folder / "a/loop").unlink(missing_ok=True)
    return folder


def write_links(folder: Path) -> Path:
    """Write a tree with links to folders, of which some lead to the same one, or around."""
    write_tree(folder)
    outside = folder.with_name(f"{folder.name}-outside")
    for name in ("one/x.png", "one/deep/y.png", "two/v.png"):
        image(outside / name, caption=name)
    (outside / "one/further").symlink_to(outside / "two")
    (outside / "one/back").symlink_to(folder)
    for name in ("z-one", "a-one", "b/also-one"):
        (folder / name).symlink_to(outside / "one")
    (folder / "again").symlink_to(folder / "b")
    (folder / "b/two").symlink_to(outside / "two")
    return folder


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


def test_several_folders_and_tars_give_the_same_images_and_warnings(tmp_path: Path, caplog) -> None:
    sources = [write_lists(tmp_path / "lists"), write_tars(tmp_path / "tars"), write_list(tmp_path / "list")]
    (tmp_path / "lists/a/link.png").unlink()
    assert compare(caplog, sources) == 21 + 9 + 8
    assert compare(caplog, [*sources[1:], tmp_path / "lists/a/b"], caption="a") == 9 + 8 + 2
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
    with pytest.raises(UserError) as expected:
        find_images([str(tmp_path)])
    with pytest.raises(UserError) as found:
        open_images([str(tmp_path)])
    assert str(found.value) == str(expected.value)


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


def test_masks_and_pairs_of_folders_and_single_images_are_read_as_a_whole(tmp_path: Path) -> None:
    folder = str(write_tree(tmp_path))
    assert open_images([folder], masks=True) is None and open_images([folder], pairs=True) is None
    assert open_images([f"{folder}/b.png"]) is None


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
