"""Datasets by the names of public configs: keys, shapes and ranges of items, and one line for what is missing."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.dummy import DummyData
from ldm.data.edit import EditDataset
from ldm.data.faceshq import CelebAHQTrain, FFHQTrain, FFHQValidation
from ldm.data.imagenet import ImageNetSRTrain, ImageNetSRValidation, ImageNetTrain, ImageNetValidation, parse_indices
from ldm.data.landscapes import RFWTrain, RFWValidation
from ldm.data.listed import read_list
from ldm.data.lsun import LSUNBase, LSUNBedroomsTrain, LSUNCatsTrain, LSUNChurchesTrain, LSUNChurchesValidation
from ldm.data.openimages import FullOpenImagesTrain, FullOpenImagesValidation, SuperresOpenImagesAdvancedTrain
from ldm.util import UserError, get_obj_from_str
from tests.ldm.image_files import gradient, write_images


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)


def write_list(path, names):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(names) + "\n")


def is_image(x, height, width):
    return x.shape == (height, width, 3) and x.dtype == torch.float32 and -1 <= x.min() < -0.5 < 0.5 < x.max() <= 1


def test_lsun_gives_centre_squares_and_paths():
    names = ["a/1.jpg", "a/2.jpg", "b/3.jpg"]
    write_images(Path("data/lsun/churches"), names)
    write_list("data/lsun/church_outdoor_train.txt", names)
    write_list("data/lsun/church_outdoor_val.txt", names[:1])
    train, validation = LSUNChurchesTrain(size=16), LSUNChurchesValidation(size=16)
    assert (len(train), len(validation)) == (3, 1)
    item = train[2]
    assert set(item) == {"image", "relative_file_path_", "file_path_"}
    assert item["relative_file_path_"] == "b/3.jpg" and item["file_path_"] == "data/lsun/churches/b/3.jpg"
    assert is_image(item["image"], 16, 16)
    square = Image.fromarray(np.array(Image.open("data/lsun/churches/a/1.jpg"))[:, 10:50])
    expected = np.array(square.resize((16, 16), Image.Resampling.BICUBIC)) / 127.5 - 1
    assert np.abs(validation[0]["image"].numpy() - expected).max() < 1e-6  # never mirrored
    assert len({float(train[0]["image"][8, 0, 1]) for _ in range(20)}) == 2  # mirrored at times
    whole = LSUNBase("data/lsun/church_outdoor_val.txt", "data/lsun/churches", interpolation="linear", flip_p=0)
    assert is_image(whole[0]["image"], 40, 40)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (LSUNBedroomsTrain, r"no list '.*/data/lsun/bedrooms_train\.txt'.*one per line"),
        (LSUNCatsTrain, r"no list '.*/data/lsun/cat_train\.txt'"),
        (lambda: FFHQTrain(256), r"no list '.*/data/ffhqtrain\.txt'"),
        (ImageNetTrain, r"no folder '.*/cache/autoencoders/data/ILSVRC2012_train/data': put ImageNet"),
        (lambda: ImageNetSRValidation(size=8, degradation="bsrgan"), "ILSVRC2012_validation/data"),
        (lambda: FullOpenImagesTrain(8), r"no folder '.*/data/openimages/train'"),
        (lambda: RFWTrain(8, 8), r"no list '.*/data/rfw/train\.txt'"),
        (lambda: EditDataset("pairs"), r"no folder '.*/pairs'"),
        (lambda: DummyData(0, [2]), "length 0"),
    ],
)
def test_what_is_missing_is_one_line_that_says_where_it_was_looked_for(build, message):
    with pytest.raises(UserError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_listed_images_that_are_missing_or_broken_are_named():
    write_images(Path("data/lsun/churches"), ["1.jpg"])
    write_list("data/lsun/church_outdoor_val.txt", ["0.jpg", "1.jpg"])
    with pytest.raises(UserError, match=r"churches/0\.jpg: no such image"):
        LSUNChurchesValidation()
    write_list("data/lsun/church_outdoor_val.txt", ["1.jpg", "2.jpg"])
    with pytest.raises(UserError, match=r"2\.jpg: No such file"):
        LSUNChurchesValidation()[1]
    Path("data/lsun/churches/2.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"2\.jpg: not a"):
        LSUNChurchesValidation()[1]
    write_list("data/lsun/church_outdoor_val.txt", [""])
    with pytest.raises(UserError, match="is empty"):
        LSUNChurchesValidation()


def test_faces_by_image_and_by_array():
    write_images(Path("data/ffhq"), ["1.png", "2.png"])
    write_list("data/ffhqtrain.txt", ["1.png"])
    write_list("data/ffhqvalidation.txt", ["2.png"])
    assert get_obj_from_str("taming.data.faceshq.FFHQTrain") is FFHQTrain
    item = FFHQTrain(size=16)[0]
    assert is_image(item["image"], 16, 16) and item["class"] == 1 and item["file_path_"] == "data/ffhq/1.png"
    assert set(FFHQValidation(keys=["class"])[0]) == {"image", "class"}
    Path("data/celebahq").mkdir()
    write_list("data/celebahqtrain.txt", ["1.npy", "2.npy"])
    np.save("data/celebahq/1.npy", gradient(40, 60).transpose(2, 0, 1)[None])
    np.save("data/celebahq/2.npy", np.zeros((3, 4, 4)))
    faces = CelebAHQTrain(size=40)
    assert torch.equal(faces[0]["image"], torch.from_numpy(gradient(40, 60)[:, 10:50]).float() / 127.5 - 1)
    with pytest.raises(UserError, match=r"2\.npy: float64 \(3, 4, 4\), not uint8"):
        faces[1]


def imagenet(part, classes=("n03", "n01", "n02")):
    root = Path(f"cache/autoencoders/data/ILSVRC2012_{part}/data")
    write_images(root, [f"{name}/{name}_{index}.JPEG" for name in classes for index in range(2)])
    return root


def test_imagenet_labels_are_those_of_the_sorted_classes():
    imagenet("train"), imagenet("validation", ["n02"])
    train, validation = ImageNetTrain(config={"size": 16}), ImageNetValidation(config={"size": 16})
    assert [train.labels["class_label"], train.labels["synsets"][:3]] == [[0, 0, 1, 1, 2, 2], ["n01", "n01", "n02"]]
    assert validation.labels["class_label"] == [1, 1]  # numbered as in training, though it has one class only
    item = validation[0]
    assert set(item) == {"image", "file_path_", "relpath", "synsets", "class_label", "human_label"}
    assert is_image(item["image"], 16, 16) and item["relpath"] == "n02/n02_0.JPEG" and item["human_label"] == "n02"
    assert len({float(train[0]["image"][0, 0, 1]) for _ in range(20)}) > 3  # cropped at random
    assert len({float(validation[0]["image"][0, 0, 1]) for _ in range(5)}) == 1
    assert ImageNetTrain(config={"sub_indices": "1-2"}).labels["class_label"] == [1, 1, 2, 2]
    assert ImageNetTrain(process_images=False)[0]["image"].shape == (40, 60, 3)


def test_imagenet_takes_numbers_and_words_of_the_users_files():
    root = imagenet("train")
    (root.parent / "index_synset.yaml").write_text("7: n01\n8: n02\n9: n03\n")
    (root.parent / "synset_human.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    labels = ImageNetTrain(data_root=str(root)).labels
    assert labels["class_label"] == [7, 7, 8, 8, 9, 9]
    assert labels["human_label"][::2] == ["tench, Tinca tinca", "goldfish", "n03"]
    (root.parent / "index_synset.yaml").write_text("7: n01\n")
    with pytest.raises(UserError, match="has no number for the class 'n02'"):
        ImageNetTrain()
    with pytest.raises(UserError, match=r"unknown key 'sise'.*did you mean 'size'"):
        ImageNetTrain(config={"sise": 3})
    assert parse_indices("0-2, 5") == {0, 1, 2, 5}
    with pytest.raises(UserError, match="sub_indices 'a'"):
        parse_indices("a")


@pytest.mark.parametrize("degradation", ["pil_nearest", "cv_area", "bsrgan", "bsrgan_light"])
def test_imagenet_sr_pairs_an_image_with_its_low_resolution(degradation):
    imagenet("train"), imagenet("validation")
    for build in (ImageNetSRTrain, ImageNetSRValidation):
        item = build(size=32, degradation=degradation, downscale_f=4)[1]
        assert item["image"].shape == (32, 32, 3) and -1 <= item["image"].min() < item["image"].max() <= 1
        assert item["LR_image"].shape == (8, 8, 3) and -1 <= item["LR_image"].min() < item["LR_image"].max() <= 1
        assert item["class_label"] == 0 and "file_path_" in item
        pooled = item["image"].reshape(8, 4, 8, 4, 3).mean((1, 3))
        assert (pooled - item["LR_image"]).abs().mean() < 0.25  # of the same crop


def test_paired_images_crop_within_their_shares():
    write_images(Path("data/openimages/train"), ["1.png"], 64, 64)
    given = {"size": 16, "degradation": "pil_bicubic", "downscale_f": 2, "min_crop_f": 0.5, "max_crop_f": 0.5}
    middle = SuperresOpenImagesAdvancedTrain(**given, random_crop=False)[0]["image"]
    assert middle[..., 0].mean() == pytest.approx(0, abs=0.02)  # rows 16 to 48 of 64
    assert middle[..., 0].max() - middle[..., 0].min() == pytest.approx(1, abs=0.1)
    anywhere = SuperresOpenImagesAdvancedTrain(**given)
    assert len({float(anywhere[0]["image"][..., 0].mean()) for _ in range(10)}) > 3
    for wrong, message in (
        ({"size": 15}, "downscale_f 2: give a whole number that divides the size, 15"),
        ({"size": None}, "size None"),
        ({"degradation": None}, "degradation is missing"),
        ({"min_crop_f": 0.9}, "min_crop_f 0.9"),
    ):
        with pytest.raises(UserError, match=message):
            SuperresOpenImagesAdvancedTrain(**(given | wrong))


def test_full_open_images_scale_then_crop():
    for part in ("train", "validation"):
        write_images(Path("data/openimages") / part, ["x/1.jpg", "2.png"])
    assert FullOpenImagesTrain(size=24, crop_size=16)[0]["image"].shape == (16, 16, 3)
    item = FullOpenImagesValidation(size=24, crop_size=16)[0]
    assert set(item) == {"image", "file_path_"}
    assert len({float(FullOpenImagesTrain(24, 16)[0]["image"].mean()) for _ in range(10)}) > 2
    with pytest.raises(UserError, match="crop_size 32: must be at most size, 24"):
        FullOpenImagesTrain(24, 32)


def test_rfw_gives_one_hot_segmentations_of_the_same_crop():
    write_images(Path("data/rfw/images"), ["1.png"], 40, 60)
    Path("data/rfw/segmentations").mkdir()
    rows = np.repeat(np.arange(40, dtype=np.uint8)[:, None], 60, 1)
    Image.fromarray(rows).save("data/rfw/segmentations/1.png")
    for part in ("train", "validation"):
        write_list(f"data/rfw/{part}.txt", ["1.png"])
    item = RFWTrain(size=40, crop_size=20, segmentation_to_float32=True)[0]
    assert item["image"].shape == (20, 20, 3) and item["segmentation"].shape == (20, 20, 182)
    assert item["segmentation"].dtype == torch.float32 and torch.equal(item["segmentation"].sum(-1), torch.ones(20, 20))
    labels = item["segmentation"].argmax(-1).float()
    assert ((item["image"][..., 0] + 1) / 2 * 39 - labels).abs().max() < 1
    assert RFWValidation(40, 20)[0]["segmentation"].dtype == torch.int64
    Image.fromarray(rows + 160).save("data/rfw/segmentations/1.png")
    with pytest.raises(UserError, match="label 199 is not below 182"):
        RFWTrain(40, 20)[0]


def test_edit_dataset_crops_and_mirrors_both_images_alike():
    seeds = [[f"{number:03}", ["7", "9"]] for number in range(20)]
    for name, _ in seeds:
        write_images(Path("pairs") / name, [f"{seed}_{which}.jpg" for seed in (7, 9) for which in (0, 1)], 48, 48)
        (Path("pairs") / name / "prompt.json").write_text(json.dumps({"edit": f"make it {name}"}))
    Path("pairs/seeds.json").write_text(json.dumps(seeds))
    splits = {split: EditDataset("pairs", split) for split in ("train", "val", "test")}
    assert {split: len(data) for split, data in splits.items()} == {"train": 18, "val": 1, "test": 1}
    assert get_obj_from_str("edit_dataset.EditDataset") is EditDataset
    data = EditDataset("pairs", "train", min_resize_res=32, max_resize_res=40, crop_res=24, flip_prob=0.5)
    item = data[3]
    assert set(item) == {"edited", "edit"} and set(item["edit"]) == {"c_concat", "c_crossattn"}
    assert item["edit"]["c_crossattn"] == "make it 003"
    assert item["edited"].shape == (3, 24, 24) and -1 <= item["edited"].min() < item["edited"].max() <= 1
    assert torch.equal(item["edited"], item["edit"]["c_concat"])  # the files are the same
    with pytest.raises(UserError, match="split 'validation'"):
        EditDataset("pairs", "validation")
    with pytest.raises(UserError, match="crop_res 64"):
        EditDataset("pairs", crop_res=64, min_resize_res=32)


@pytest.mark.parametrize("seeds", [{}, [3], [["a"]], [["a", []]], [[3, ["7"]]], [["../b", ["7"]]], [["/b", ["7"]]]])
def test_edit_dataset_refuses_seeds_that_are_none_or_lead_outside(seeds):
    Path("pairs").mkdir()
    Path("pairs/seeds.json").write_text(json.dumps(seeds))
    with pytest.raises(UserError, match=r"seeds\.json: (expected a list|a pair '.*' is outside the folder)"):
        EditDataset("pairs", "train")


@pytest.mark.parametrize("prompt", ["[]", "{}", "3", "{"])
def test_edit_dataset_names_what_is_no_prompt(prompt):
    Path("pairs/a").mkdir(parents=True)
    Path("pairs/seeds.json").write_text(json.dumps([["a", ["../../x"]]] * 20))
    Path("pairs/a/prompt.json").write_text(prompt)
    data = EditDataset("pairs", "train")
    with pytest.raises(UserError, match=r"prompt\.json"):
        data[0]
    Path("pairs/a/prompt.json").write_text('{"edit": "x"}')
    with pytest.raises(UserError, match=r"seeds.json: an image 'a/../../x_0.jpg' is outside the folder"):
        data[0]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_listed_images_of_another_spelling_are_found(form):
    other = "NFD" if form == "NFC" else "NFC"
    written, listed = (unicodedata.normalize(name, "été/café.jpg") for name in (form, other))
    write_images(Path("data/lsun/churches"), [written])
    Path("list.txt").write_bytes(f"\ufeff{listed}\r\n".encode())
    (item,) = LSUNBase("list.txt", "data/lsun/churches", size=32)
    assert is_image(item["image"], 32, 32)


def test_a_list_is_split_at_line_ends_only():
    Path("list.txt").write_bytes("a\u2028b.jpg\r\nc\x0bd.jpg\re.jpg".encode())
    assert read_list("list.txt", "images") == ["a\u2028b.jpg", "c\x0bd.jpg", "e.jpg"]


def test_a_list_names_no_image_outside_its_folder():
    Path("data/rfw/images").mkdir(parents=True)
    write_list("data/rfw/train.txt", ["1.png", "../../secret.png"])
    with pytest.raises(UserError, match=r"an image of the list '../../secret.png' is outside the folder"):
        RFWTrain(8, 8)


def test_dummy_data():
    item = DummyData(4, [8, 8, 3])[0]
    assert item["jpg"].shape == (8, 8, 3) and len(item["txt"]) == 20 and len(DummyData(4, [1])) == 4
