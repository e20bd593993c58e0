import json

import numpy as np
import pytest
import torch

from ldm.data.datasets import ImageCaptionDataset
from ldm.data.image_sources import find_images
from ldm.util import UserError
from tests.ldm.shard_files import png, write_tar

RED = png(np.full((4, 6, 3), (255, 0, 0), np.uint8))


def put(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def described(items):
    return [(item.name, item.caption) for item in items]


def test_captions_beside_images_in_folders_of_folders(tmp_path, caplog):
    files = {
        "b.PNG": RED,
        "b.txt": "\ufeff  a red\n flag ",
        "sub/a.jpg": RED,
        "sub/a.txt": "x",
        ".c.png": RED,
        ".t/d.png": RED,
        "d.mp4": "?",
    }
    assert described(find_images(put(tmp_path, files))) == [("b.PNG", "a red flag"), ("sub/a.jpg", "x")]
    assert "files of other types skipped: .mp4" in caplog.text
    assert "2 hidden images and folders skipped: .c.png, .t" in caplog.text


def test_links_to_folders_that_are_not_there_are_told_of(tmp_path, caplog):
    """Such as to a disk that is not mounted. A file that macOS writes beside an image is no image."""
    put(tmp_path, {"a.png": RED, "a.txt": "a", "._a.png": "?", ".DS_Store": "?"})
    (tmp_path / "photos").symlink_to("/nowhere/photos")
    assert described(find_images(tmp_path)) == [("a.png", "a")]
    assert "1 links to nothing skipped: photos" in caplog.text and "hidden" not in caplog.text


def test_images_without_a_caption_are_told_of(tmp_path, caplog):
    items = find_images(put(tmp_path, {"a.png": RED, "a.txt": "a", "b.png": RED, "c.png": RED, "c.txt": " \n"}))
    assert described(items) == [("a.png", "a"), ("b.png", None), ("c.png", None)]
    assert "2 images have no caption and get the empty one: b.png, c.png" in caplog.text
    with pytest.raises(UserError, match="no image has a caption"):
        find_images(put(tmp_path / "none", {"a.png": RED}))


def test_one_caption_for_all(tmp_path):
    put(tmp_path, {"a.png": RED, "a.txt": b"\xff", "b.png": RED})
    assert described(find_images(tmp_path, "tom")) == [("a.png", "tom"), ("b.png", "tom")]


def test_a_caption_that_cannot_be_read_is_the_images_error(tmp_path):
    bad, _ = find_images(put(tmp_path, {"a.png": RED, "a.txt": b"\xff", "b.png": RED, "b.txt": "b"}))
    with pytest.raises(UserError, match=r"a\.png: its caption is not UTF-8"):
        bad.read()


def metadata(*entries):
    return "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)


def test_metadata(tmp_path, caplog):
    lines = metadata(
        {"file_name": "s/a.png", "text": "tom"}, "", {"file_name": "gone.png", "text": "x"}, {"file_name": "b.png"}
    )
    put(tmp_path, {"metadata.jsonl": lines, "s/a.png": RED, "b.png": RED, "c.png": RED})
    items = find_images(tmp_path)
    assert described(items) == [("s/a.png", "tom"), ("gone.png", "x"), ("b.png", None)]
    assert "1 images skipped, such as c.png, because they are not in metadata.jsonl" in caplog.text
    with pytest.raises(UserError, match=r"gone\.png: No such file"):
        items[1].read()


def test_a_caption_does_not_depend_on_how_its_image_is_named(tmp_path):
    """The metadata file takes precedence over the file beside the image, and an entry without a caption does not."""
    lines = metadata({"file_name": "a.png", "text": "listed"}, {"file_name": "b.png"})
    put(tmp_path, {"metadata.jsonl": lines, "a.png": RED, "a.txt": b"beside", "b.png": RED, "b.txt": b"beside"})
    single = find_images([str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    assert [item.caption for item in single] == [item.caption for item in find_images(tmp_path)] == ["listed", "beside"]


def test_only_line_feeds_end_a_line_of_metadata(tmp_path):
    text = "one\u2028two\x85three\u2029four"
    lines = [json.dumps({"file_name": f"{n}.png", "text": text}, ensure_ascii=False) for n in range(2)]
    put(tmp_path, {"metadata.jsonl": "\r\n".join(lines), "0.png": RED, "1.png": RED})
    assert described(find_images(tmp_path)) == [("0.png", "one two three four"), ("1.png", "one two three four")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected"),
        ({"text": "x"}, "expected"),
        ({"file_name": "../x.png", "text": "x"}, "outside the folder"),
        ({"file_name": "/x.png", "text": "x"}, "outside the folder"),
        ({"file_name": "x.png", "text": 3}, "not a string"),
        ("[" * 100_000, "not JSON"),
        ({"file_name": "x.png", "text": "\ud83d"}, "surrogate"),
    ],
)
def test_broken_metadata_is_named_by_line(tmp_path, line, message):
    put(tmp_path, {"metadata.jsonl": metadata({"file_name": "a.png", "text": "x"}, line), "a.png": RED})
    with pytest.raises(UserError, match=f"line 2: .*{message}"):
        find_images(tmp_path)


def test_tars_of_images(tmp_path):
    members = [
        ("a.png", RED),
        ("a.txt", b"a flag"),
        ("b.JPG", RED),
        ("b.txt", b"b"),
        ("c.txt", b"c"),
        ("c.json", b"{}"),
    ]
    path = write_tar(tmp_path / "set-0.tar", members)
    for source in (tmp_path, path, str(tmp_path / "set-*.tar"), [str(path)]):
        items = find_images(source)
        assert described(items) == [("set-0.tar/a.png", "a flag"), ("set-0.tar/b.jpg", "b"), ("set-0.tar/c", "c")]
        assert items[0].read().shape == items[1].read().shape == (4, 6, 3)
        with pytest.raises(UserError, match=r"set-0\.tar/c: no image"):
            items[2].read()
    assert {item.caption for item in find_images(path, "tom")} == {"tom"}


def test_images_of_kinds_that_are_not_read_are_counted(tmp_path):
    put(tmp_path, {"a.png": RED, "a.txt": "a", "b.HEIC": "?", "b.txt": "b", "c.svg": "?", "d.jfif": RED, "d.txt": "d"})
    items = find_images(tmp_path)
    assert [item.name for item in items] == ["a.png", "b.HEIC", "c.svg", "d.jfif"]
    assert items[3].read().shape == (4, 6, 3)
    for item in items[1:3]:
        with pytest.raises(UserError, match=f"{item.name}: images of this kind are not read; convert the image"):
            item.read()
    with pytest.raises(UserError, match=r"b\.HEIC: images of this kind"):
        ImageCaptionDataset(tmp_path, 8)


def test_images_and_tars_in_one_folder_are_refused(tmp_path):
    write_tar(put(tmp_path, {"a.png": RED, "a.txt": "a"}) / "sub/set-0.tar", [("b.png", RED), ("b.txt", b"b")])
    with pytest.raises(UserError, match=r"both images and tars, a\.png and sub/set-0\.tar"):
        find_images(tmp_path)


def test_several_sources_of_several_kinds(tmp_path):
    for name in "AB":
        put(tmp_path / name, {"x.png": RED, "x.txt": name})
    write_tar(tmp_path / "T/set-0.tar", [("b.png", RED), ("b.txt", b"b")])
    one = put(tmp_path, {"one.png": RED, "one.txt": "1"}) / "one.png"
    assert described(find_images(one)) == [("one.png", "1")]
    items = find_images([tmp_path / "A", tmp_path / "B", tmp_path / "T", one])
    assert described(items) == [("A/x.png", "A"), ("B/x.png", "B"), ("T/set-0.tar/b.png", "b"), ("one.png", "1")]
    with pytest.raises(UserError, match=r"A/x\.png: occurs twice"):
        find_images([tmp_path / "A", tmp_path / "A"])
    lines = metadata({"file_name": "x.png", "text": "1"}, {"file_name": "./x.png", "text": "2"})
    with pytest.raises(UserError, match=r"twice/x\.png: occurs twice"):
        find_images(put(tmp_path / "twice", {"metadata.jsonl": lines, "x.png": RED}))
    with pytest.raises(UserError, match=r"set-0\.tar: occurs twice"):
        find_images(f"{tmp_path}/T/set-{{0,0}}.tar")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: no images"):
        find_images([tmp_path / "A", tmp_path / "none"])


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no images"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="download it first"):
        find_images("https://example.org/a.tar")


def test_the_dataset_gives_channels_last_images_in_range(tmp_path):
    put(tmp_path, {"a.png": RED, "a.txt": "red"})
    item = ImageCaptionDataset(tmp_path, 8, image_key="jpg", caption_key="txt")[0]
    assert item["txt"] == "red"
    assert item["jpg"].shape == (8, 8, 3) and item["jpg"].dtype == torch.float32
    assert torch.allclose(item["jpg"], torch.tensor([1.0, -1.0, -1.0]).expand(8, 8, 3))


def test_half_the_images_are_mirrored_with_flip(tmp_path):
    half = np.zeros((4, 4, 3), np.uint8)
    half[:, 2:] = 255
    put(tmp_path, {"a.png": png(half), "a.txt": "x"})
    torch.manual_seed(0)
    dataset = ImageCaptionDataset(tmp_path, 4, flip=True)
    sides = [dataset[0]["image"][0, 0, 0].item() > 0 for _ in range(40)]
    assert 8 < sum(sides) < 32


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    put(tmp_path, {"a.png": RED[:45], "a.txt": "x"})
    with pytest.raises(UserError, match=r"^a\.png: "):
        ImageCaptionDataset(tmp_path, 8)[0]
