"""Folders of images with captions, captions alone, and the local stand-in for hub data sets."""

import json
import unicodedata

import numpy as np
import pytest
import torch

from ldm.data.simple import FolderData, IdRetreivalDataset, TextOnly, hf_dataset
from ldm.util import UserError
from tests.ldm.image_files import gradient, write_images

SQUARE = [
    {"target": "torchvision.transforms.Resize", "params": {"size": 16, "interpolation": 3}},
    {"target": "torchvision.transforms.RandomCrop", "params": {"size": 16}},
    {"target": "torchvision.transforms.RandomHorizontalFlip"},
]


class Marked:
    def __call__(self, sample):
        return {**sample, "marked": True}


def test_folder_data_finds_captioned_images_of_another_spelling(tmp_path):
    write_images(tmp_path, [unicodedata.normalize("NFD", "café.JPG")])
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({unicodedata.normalize("NFC", "café.jpg"): "a cup"}), encoding="utf-8-sig")
    (item,) = FolderData(tmp_path, captions)
    assert item["txt"] == "a cup" and item["image"].shape == (40, 60, 3)


def test_folder_data_reads_one_kind_of_file(tmp_path):
    write_images(tmp_path, ["a/1.png", "2.png", "3.jpg"])
    data = FolderData(tmp_path, ext="png", default_caption="none", return_paths=True, postprocess=Marked())
    assert data.sample_keys == ["2.png", "a/1.png"]
    item = data[0]
    assert item["txt"] == "none" and item["path"] == str(tmp_path / "2.png") and item["marked"]
    assert torch.equal(item["image"], torch.from_numpy(gradient(40, 60)).float() / 127.5 - 1)
    assert len(FolderData(tmp_path, ext=["png", ".JPG"])) == 3
    assert FolderData(tmp_path, image_transforms=SQUARE)[0]["image"].shape == (16, 16, 3)
    tensors = [*SQUARE[:2], {"target": "torchvision.transforms.ToTensor"}]
    as_tensor = FolderData(tmp_path, image_transforms=tensors)[0]["image"]
    assert as_tensor.shape == (16, 16, 3) and -1 <= as_tensor.min() < -0.5 < 0.5 < as_tensor.max() <= 1


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_folder_data_reads_captions(tmp_path, kind):
    write_images(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / f"captions.{kind}"
    pairs = {"2.jpg": "a cat, big", "1.jpg": "a dog"}
    lines = {
        "json": json.dumps(pairs),
        "jsonl": "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in pairs.items()),
        "csv": "file_name,text\n" + "\n".join(f'{name},"{text}"' for name, text in pairs.items()),
    }
    file.write_text(lines[kind])
    data = FolderData(tmp_path, caption_file=file)
    assert [data[index]["txt"] for index in range(len(data))] == ["a cat, big", "a dog"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", "{", r"c\.json: not JSON"),
        ("c.json", "[1]", "c.json, entry 1: expected captions by file name, got '1'"),
        ("c.json", "3", "c.json, entry 1: expected captions by file name, got '3'"),
        ("c.json", '{"a.jpg": 3}', r"c\.json, 'a\.jpg': text is not a string: 3"),
        ("c.json", "{}", r"c\.json: has no captions"),
        ("c.jsonl", '{"name": "a"}', "c.jsonl, line 1: expected"),
        ("c.json", '{"../a.jpg": "x"}', "outside the folder"),
        ("c.txt", "x", r"read from \.jsonl, \.csv, \.json"),
        ("c.json", None, r"no captions '.*c\.json'"),
    ],
)
def test_folder_data_refuses_captions_in_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        FolderData(tmp_path, caption_file=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folder_data_reads_entries_of_other_programs(tmp_path):
    write_images(tmp_path, ["1.jpg", "2.jpg"])
    entries = {"1.jpg": {"caption": "one", "tags": "x"}, "2.jpg": {"tags": "y"}}
    listed = [{"file_name": name, **entry} for name, entry in entries.items()]
    for content in (entries, listed):
        (tmp_path / "c.json").write_text(json.dumps(content))
        data = FolderData(tmp_path, caption_file=tmp_path / "c.json", default_caption="none")
        assert [data[index]["txt"] for index in range(2)] == ["one", "none"]


def test_folder_data_names_images_that_are_too_small_and_kinds_that_are_not_there(tmp_path):
    write_images(tmp_path, ["1.jpg"])
    crop = [{"target": "torchvision.transforms.RandomCrop", "params": {"size": 50}}]
    with pytest.raises(UserError, match=r"1\.jpg: RandomCrop of 50x50 from an image of 40x60"):
        FolderData(tmp_path, image_transforms=crop)[0]
    with pytest.raises(UserError, match=r"no image with ext \.png"):
        FolderData(tmp_path, ext="png")
    with pytest.raises(UserError, match=r"no folder '.*/nowhere'"):
        FolderData(tmp_path / "nowhere")


def test_id_retreival_dataset_adds_a_match(tmp_path):
    write_images(tmp_path / "faces", ["1.jpg", "3.jpg"])
    write_images(tmp_path / "faces", ["2.jpg"], 20, 20)
    (tmp_path / "ret.json").write_text(json.dumps({"1.jpg": ["2.jpg"]}))
    data = IdRetreivalDataset(tmp_path / "ret.json", tmp_path / "faces", ext="jpg")
    assert data[0]["match"].shape == (20, 20, 3) and data[0]["image"].shape == (40, 60, 3)
    assert torch.equal(data[2]["match"], data[2]["image"])  # none is listed: itself
    with pytest.raises(UserError, match=r"ret_file .*cannot be read"):
        IdRetreivalDataset(tmp_path / "none.json", tmp_path / "faces")


def test_text_only(tmp_path):
    data = TextOnly(["a", "b"], 8, n_gpus=2)
    assert [data[index]["txt"] for index in range(len(data))] == ["a", "a", "b", "b"]
    assert data[0]["image"].shape == (8, 8, 3) and (data[0]["image"] == -1).all()
    (tmp_path / "captions.txt").write_text("one\n\ntwo\n")
    named = TextOnly(str(tmp_path / "captions.txt"), 8, image_key="jpg", caption_key="caption")
    assert named[1]["caption"] == "two" and "jpg" in named[1]
    with pytest.raises(UserError, match="at least one"):
        TextOnly([], 8)


def test_hf_dataset_reads_a_local_folder_and_downloads_nothing(tmp_path):
    write_images(tmp_path / "set" / "train", ["1.jpg", "2.jpg"])
    lines = [{"file_name": "2.jpg", "text": "two", "tags": "b"}, {"file_name": "1.jpg", "text": "one", "tags": "a"}]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = hf_dataset(str(tmp_path / "set"), image_transforms=SQUARE)
    assert [data[index]["txt"] for index in range(2)] == ["two", "one"]
    assert data[0]["image"].shape == (16, 16, 3)
    other = hf_dataset(str(tmp_path / "set"), text_column="tags", image_key="jpg", caption_key="c")
    assert (other[0]["c"], "jpg" in other[0]) == ("b", True)
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: has no 'caption', only 'file_name', 'text', 'tags'"):
        hf_dataset(str(tmp_path / "set"), text_column="caption")
    write_images(tmp_path / "beside", ["1.jpg"])
    (tmp_path / "beside" / "1.txt").write_text("next to it")
    assert hf_dataset(str(tmp_path / "beside"))[0]["txt"] == "next to it"
    with pytest.raises(UserError, match=r"no folder '.*someone/some-captions'.*nothing is downloaded"):
        hf_dataset("someone/some-captions")


def test_folder_data_gives_the_same_for_a_seed(tmp_path):
    write_images(tmp_path, ["1.jpg"])
    data = FolderData(tmp_path, image_transforms=SQUARE)
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(data[0]["image"].numpy())
    assert np.array_equal(*found)
