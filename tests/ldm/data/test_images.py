import json

import numpy as np
import pytest
import torch
from shard_files import png, write_tar

from ldm.data.images import ImageCaptionDataset, find_images
from ldm.util import UserError

RED = png(np.full((4, 6, 3), (255, 0, 0), np.uint8))


def put(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def described(items):
    return [(item.name, item.caption) for item in items]


def test_captions_beside_pictures_in_folders_of_folders(tmp_path, caplog):
    files = {
        "b.PNG": RED,
        "b.txt": "\ufeff  a red\n flag ",
        "sub/a.jpg": RED,
        "sub/a.txt": "x",
        ".c.png": RED,
        ".t/d.png": RED,
        "d.heic": "?",
    }
    assert described(find_images(put(tmp_path, files))) == [("b.PNG", "a red flag"), ("sub/a.jpg", "x")]
    assert "left out: .heic" in caplog.text


def test_pictures_without_a_caption_are_told_of(tmp_path, caplog):
    items = find_images(put(tmp_path, {"a.png": RED, "a.txt": "a", "b.png": RED, "c.png": RED, "c.txt": " \n"}))
    assert described(items) == [("a.png", "a"), ("b.png", None), ("c.png", None)]
    assert "2 pictures have no caption and get the empty one: b.png, c.png" in caplog.text
    with pytest.raises(UserError, match="no picture has a caption"):
        find_images(put(tmp_path / "none", {"a.png": RED}))


def test_one_caption_for_all(tmp_path):
    put(tmp_path, {"a.png": RED, "a.txt": b"\xff", "b.png": RED})
    assert described(find_images(tmp_path, "tom")) == [("a.png", "tom"), ("b.png", "tom")]


def test_a_caption_that_cannot_be_read_is_the_pictures_error(tmp_path):
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
    assert "1 pictures, such as c.png, are not in metadata.jsonl" in caplog.text
    with pytest.raises(UserError, match=r"gone\.png: No such file"):
        items[1].read()


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


def test_tars_of_pictures(tmp_path):
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
        with pytest.raises(UserError, match=r"set-0\.tar/c: no picture"):
            items[2].read()
    assert {item.caption for item in find_images(path, "tom")} == {"tom"}


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no pictures"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="fetch it first"):
        find_images("https://example.org/a.tar")


def test_the_dataset_gives_channels_last_pictures_in_range(tmp_path):
    put(tmp_path, {"a.png": RED, "a.txt": "red"})
    item = ImageCaptionDataset(tmp_path, 8, image_key="jpg", caption_key="txt")[0]
    assert item["txt"] == "red"
    assert item["jpg"].shape == (8, 8, 3) and item["jpg"].dtype == torch.float32
    assert torch.allclose(item["jpg"], torch.tensor([1.0, -1.0, -1.0]).expand(8, 8, 3))


def test_half_the_pictures_are_mirrored_with_flip(tmp_path):
    half = np.zeros((4, 4, 3), np.uint8)
    half[:, 2:] = 255
    put(tmp_path, {"a.png": png(half), "a.txt": "x"})
    torch.manual_seed(0)
    dataset = ImageCaptionDataset(tmp_path, 4, flip=True)
    sides = [dataset[0]["image"][0, 0, 0].item() > 0 for _ in range(40)]
    assert 8 < sum(sides) < 32


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    put(tmp_path, {"a.png": RED[:45], "a.txt": "x"})
    with pytest.raises(UserError, match=r"^a\.png: "):
        ImageCaptionDataset(tmp_path, 8)[0]
