"""Tars of images with LAION's metadata: batches, filters, what is added to items, and an exact resume."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.laion import AddEdge, AddLR, AddMask, WebDataModuleFromConfig
from ldm.data.tar_images import Filter, read_words
from ldm.images.masks import STYLES, random_mask
from ldm.util import UserError
from tests.ldm.data.test_datamodule import batches
from tests.ldm.image_files import gradient

SQUARE = [
    {"target": "torchvision.transforms.Resize", "params": {"size": 16, "interpolation": 3}},
    {"target": "torchvision.transforms.RandomCrop", "params": {"size": 16}},
]


def write_tar(path, numbers, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    Image.fromarray(gradient(20, 30)).save(image, format="JPEG")
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            described = {"original_width": 100 * number, "original_height": 600, "pwatermark": number / 10} | metadata
            members = {
                "jpg": image.getvalue(),
                "txt": f"caption {number}".encode(),
                "json": json.dumps(described).encode(),
            }
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{number:05}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def split(**given):
    return {"shards": "{00000..00001}.tar -", "shuffle": 10, "image_key": "jpg", "image_transforms": SQUARE} | given


@pytest.fixture
def tars(tmp_path):
    write_tar(tmp_path / "00000.tar", range(4))
    write_tar(tmp_path / "00001.tar", range(4, 10))
    return str(tmp_path)


def test_web_data_module_reads_every_image_of_local_tars(tars):
    data = WebDataModuleFromConfig(tars, 4, split(), split(shuffle=0), num_workers=0, val_batch_size=5, seed=0)
    train, validation = list(batches(data, "train")), list(batches(data, "val"))
    assert [len(batch["txt"]) for batch in train] == [4, 4, 2] and [len(b["txt"]) for b in validation] == [5, 5]
    assert train[0]["jpg"].shape == (4, 16, 16, 3) and train[0]["jpg"].min() >= -1
    seen = [text for batch in train for text in batch["txt"]]
    assert sorted(seen) == [f"caption {number}" for number in range(10)] != seen  # shuffled
    assert [text for batch in validation for text in batch["txt"]] == sorted(seen)


def test_web_data_module_filters_by_metadata(tars, tmp_path):
    (tmp_path / "words.yaml").write_text("- caption 9\n")
    given = {"min_size": 300, "max_pwatermark": 0.75, "filter_word_list": str(tmp_path / "words.yaml")}
    data = WebDataModuleFromConfig(tars, 1, split(shuffle=0), num_workers=0, **given)
    assert [b["txt"][0] for b in batches(data, "train")] == [f"caption {n}" for n in range(3, 8)]
    none = WebDataModuleFromConfig(tars, 1, split(), num_workers=0, p_unsafe_threshold=0.5)
    with pytest.raises(UserError, match="none of 10 passes the filters"):
        none.setup("fit")


def test_tar_images_tells_a_tar_that_was_replaced(tars, tmp_path):
    data = WebDataModuleFromConfig(tars, 1, split(shuffle=0), num_workers=0)
    data.setup("fit")
    dataset = data.datasets["train"]
    assert dataset[5]["txt"] == "caption 5"
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001.tar: was deleted or moved"):
        dataset[5]
    write_tar(tmp_path / "00001.tar", range(20, 26))
    with pytest.raises(UserError, match=r"00001.tar: was replaced or changed"):
        dataset[5]
    assert dataset[1]["txt"] == "caption 1"


def test_filter():
    keep = Filter(min_size=512, max_pwatermark=0.5, p_unsafe_threshold=0.1, words=["Bad"])
    good = {"original_width": 512, "original_height": 600, "pwatermark": 0.5, "punsafe": 0.1}
    assert keep(good, "a cat") and not keep(good, "a BAD cat")
    for key, value in {"original_width": 511, "original_height": None, "pwatermark": 0.6, "punsafe": "x"}.items():
        assert not keep(good | {key: value}, "a cat")
    assert not Filter(max_pwatermark=1.0) and keep


def test_read_words(tmp_path):
    (tmp_path / "w.yaml").write_text("a: [x, y]\nb: [z]\n")
    assert read_words(tmp_path / "w.yaml") == ["x", "y", "z"] and read_words(None) == []
    (tmp_path / "w.yaml").write_text("a: 3\n")
    with pytest.raises(UserError, match="give a YAML list of words"):
        read_words(tmp_path / "w.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_words(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("base", "given", "message"),
    [
        ("__improvedaesthetic__", {}, "stands for a set on its authors' servers"),
        (None, {"shards": "http://host/0.tar"}, "is not a local tar; download it first"),
        (None, {"shards": "/nowhere/0.tar"}, "/nowhere/0.tar: no such file"),
        ("tars", {"shards": None}, "data.params.train.shards is missing"),
        ("tars", {"image_key": "txt"}, "image_key 'txt'"),
        ("tars", {"image_key": "webp"}, "no sample has a .webp"),
        ("tars", {"shard": "x"}, "unknown key 'shard' in data.params.train; did you mean 'shards'"),
        ("tars", {"postprocess": {"target": "ldm.data.laion.AddMask", "params": {"mode": "big"}}}, "mode 'big'"),
    ],
)
def test_web_data_module_refuses_in_one_line(tars, base, given, message):
    with pytest.raises(UserError, match=message) as caught:
        WebDataModuleFromConfig(tars if base == "tars" else base, 1, split(**given), num_workers=0).setup("fit")
    assert "\n" not in str(caught.value)


def image_item():
    return {"jpg": torch.from_numpy(gradient(32, 32)).float() / 127.5 - 1, "txt": "x"}


def test_add_lr_gives_a_degraded_version():
    torch.manual_seed(0)
    item = image_item()
    assert AddLR(factor=4)(item)["lr"].shape == (8, 8, 3)
    assert AddLR(factor=2, initial_size=16)(item)["lr"].shape == (8, 8, 3)
    for factor in (1, 4):
        low = AddLR(factor=factor, output_size=32)(item)["lr"]
        assert low.shape == (32, 32, 3) and low.abs().max() <= 1
        assert 0 < (low - item["jpg"]).abs().mean() < 0.2
    with pytest.raises(UserError, match="factor 0"):
        AddLR(0)


def test_add_mask_hides_what_it_marks():
    torch.manual_seed(0)
    item = image_item()
    added = AddMask("512train")(item)
    assert added["mask"].shape == (32, 32, 1) and set(added["mask"].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(added["masked_image"], torch.where(added["mask"] > 0, 0.0, item["jpg"]))
    assert AddMask(p_drop=1.0)(item)["mask"].min() == 1
    with pytest.raises(UserError, match="p_drop 2"):
        AddMask(p_drop=2)


def test_add_edge_shows_edges_where_the_image_is_hidden():
    torch.manual_seed(0)
    item = image_item()
    item["jpg"] = torch.full_like(item["jpg"], -1.0)
    item["jpg"][:, 16:] = 1.0
    added = AddEdge("512train-large", p_drop=1.0)(item)
    strength = added["smoothing_strength"]
    assert strength.shape == (32, 32, 1) and strength.unique().numel() == 1 and strength.abs().max() <= 1
    brightest = added["masked_image"].mean((0, 2)).argmax()
    assert 14 <= brightest <= 16 and added["masked_image"][:, 0].max() < 0
    seen = AddEdge("512narrow")(item)
    assert torch.equal(seen["masked_image"][seen["mask"][..., 0] == 0], item["jpg"][seen["mask"][..., 0] == 0])


@pytest.mark.parametrize("mode", STYLES)
def test_random_mask_always_hides_some_and_styles_differ(mode):
    torch.manual_seed(0)
    shares = [float(random_mask(48, 64, STYLES[mode]).mean()) for _ in range(60)]
    assert min(shares) > 0 and len(set(shares)) > 30
    bounds = {"narrow": (0.005, 0.3), "large": (0.3, 0.9)}.get(
        mode.split("-")[-1].removeprefix("512").removeprefix("256")
    )
    if bounds:
        assert bounds[0] < np.mean(shares) < bounds[1]
