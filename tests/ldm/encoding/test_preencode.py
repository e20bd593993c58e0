import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoint import weights_digest
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.image_sources import find_images
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.preencode import preencode
from ldm.encoding.read import sample_key
from ldm.files import read_span
from ldm.images.find import ImageItem
from ldm.modules.encoders.tokenizer import ClipTokenizer
from ldm.shards import npy
from ldm.shards.index import read_index, write_index
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import CONTEXT, POOLED
from ldm.shards.tar import index_tar
from ldm.shards.writer import Shard
from ldm.util import UserError
from tests.ldm.encoding.toy_encoder import Model, image, run
from tests.ldm.shard_files import png, write_tar
from tests.waiting import LIMIT


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for number in range(5):
        image(folder / f"p.{number}.png", (20 + number, 16), caption="a cat" if number < 4 else "a dog")
    return folder


def test_a_set_is_what_training_reads(images, tmp_path):
    report, _ = run(images, tmp_path / "out" / "s-%03d.tar")
    assert (report.samples, report.images, report.failed, report.without_caption) == (5, 5, [], 0)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "null.t5.npy", "s-000.tar", "s-001.tar"]
    dataset = ShardDataset(sorted(out.glob("*.tar")))
    assert len(dataset) == 5
    sample = dataset[4]
    assert sample["__key__"] == "000004_p_4" and sample["txt"] == "a dog"
    assert sample["f8"].shape == (8, 2, 2) and sample["f8"].dtype == np.float16
    assert sample["t5"].shape == (7, 6) and sample["t5"].dtype == np.float16 and (sample["t5"] == 6).all()
    assert (npy.decode(bytearray((out / "null.t5.npy").read_bytes()), "null") == 1).all()
    assert (
        sample["f8"][4:7].min() == -30 and sample["f8"][7].max() == 20
    )  # log-variances, clamped as when they are read


def test_a_sample_says_where_it_comes_from(images, tmp_path):
    run(images, tmp_path / "s.tar", flip=True)
    sample = index_tar(tmp_path / "s.tar")[1]
    assert sorted(sample.spans) == ["f8.npy", "json", "t5.npy", "txt"]
    with (tmp_path / "s.tar").open("rb") as file:
        origin = json.loads(read_span(file.fileno(), *sample.spans["json"], "x"))
    expected = {"source": "p.0.png", "height": 16, "width": 20, "crop": [0, 2, 16, 16], "size": [16, 16], "flip": True}
    sizes = {"original_size": [16, 20], "crop_top_left": [0, 2], "target_size": [16, 16]}
    assert origin == expected | sizes


def test_the_index_describes_the_set(images, tmp_path):
    report, _ = run(images, tmp_path / "s-%d.tar")
    index = json.loads((tmp_path / "index.json").read_text())
    assert (
        index["shards"] == report.shards and sum(shard["samples"] for shard in index["shards"]) == index["samples"] == 5
    )
    described = ("format", "out", "complete", "size", "buckets", "sizes", "f8", "t5", "scale_factor")
    assert {key: index[key] for key in described} == {
        "format": 2,
        "out": "s-%d.tar",
        "complete": True,
        "size": 16,
        "buckets": False,
        "sizes": {"16x16": 5},
        "f8": [[8, 2, 2]],
        "t5": [7, 6],
        "scale_factor": 0.5,
    }


def test_the_index_tells_the_weights_as_they_were_given(images, tmp_path):
    model = Model()
    model.first_stage_model.weight = nn.Parameter(torch.full((3,), 0.1))
    digest = weights_digest({"weight": torch.full((3,), 0.1)})
    preencode(SampleEncoder(model, dtype=torch.bfloat16), find_images(images), str(tmp_path / "s.tar"), size=16)
    index = read_index(tmp_path)
    assert model.first_stage_model.weight.dtype == torch.bfloat16
    assert (index["autoencoder"], index["text_tower"]) == (digest, None)


def test_one_pass_an_image_and_one_a_caption(images, tmp_path):
    _, model = run(images, tmp_path / "a" / "s.tar")
    assert model.first_stage_model.calls == [2, 2, 1]
    assert model.texts == ["", "a cat", "a dog"]
    _, model = run(images, tmp_path / "c" / "s-%d.tar")  # shards of 3 and 2, which know nothing of each other
    assert model.first_stage_model.calls == [2, 1, 2]
    assert model.texts == ["", "a cat", "a cat", "a dog"]
    _, model = run(images, tmp_path / "b" / "s.tar", caption="tom", flip=True)
    assert model.first_stage_model.calls == [2, 2, 2, 2, 1, 1]
    assert model.texts == ["", "tom"]


def test_a_batch_is_written_while_the_next_is_encoded(images, tmp_path, monkeypatch):
    second, write, overlapped = threading.Event(), Shard.write, []

    class Signalling(Model):
        def get_learned_conditioning(self, texts):
            if self.first_stage_model.calls:
                second.set()
            return super().get_learned_conditioning(texts)

    def waiting(self, *sample):
        overlapped.append(second.wait(LIMIT))
        write(self, *sample)

    monkeypatch.setattr(Shard, "write", waiting)
    run(images, tmp_path / "s.tar", Signalling(), batch_size=4)
    assert overlapped == [True] * 5


def test_no_more_than_some_batches_are_in_memory(tmp_path, monkeypatch):
    for number in range(80):  # the first waits for another of its size, and in vain
        image(tmp_path / "in" / f"{number:02d}.png", (80, 20) if number == 0 else (20, 20), caption="x")
    read, write, moved, held = ImageItem.read, Shard.write, {"read": 0, "written": 0}, []

    def counted_read(item, then):
        moved["read"] += 1
        held.append(moved["read"] - moved["written"])
        return read(item, then)

    def counted_write(shard, *sample):
        write(shard, *sample)
        moved["written"] += 1

    monkeypatch.setattr(ImageItem, "read", counted_read)
    monkeypatch.setattr(Shard, "write", counted_write)
    run(tmp_path / "in", tmp_path / "a" / "s.tar", size=64, buckets=True, batch_size=1)
    run(tmp_path / "in", tmp_path / "b" / "s.tar", size=128, buckets=True, batch_size=2)
    assert moved == {"read": 160, "written": 160}
    assert max(held[:80]) <= 5 and max(held[80:]) <= 16 * 2 + 4 * 2


def test_flip_adds_the_mirror_image(images, tmp_path):
    report, _ = run(images, tmp_path / "s.tar", flip=True)
    assert (report.samples, report.images) == (10, 5)
    dataset = ShardDataset([tmp_path / "s.tar"])
    plain, mirrored = dataset[0], dataset[1]
    assert mirrored["__key__"] == plain["__key__"] + "_flip" and mirrored["txt"] == plain["txt"]
    np.testing.assert_array_equal(mirrored["f8"], plain["f8"][..., ::-1])
    assert not np.array_equal(mirrored["f8"], plain["f8"])


@pytest.mark.parametrize("options", [{"workers": 2}, {"batch_size": 3}, {"batch_size": 64}])
def test_the_bytes_do_not_depend_on_how_it_was_run(images, tmp_path, options):
    first, _ = run(images, tmp_path / "a" / "s-%d.tar")
    second, _ = run(images, tmp_path / "b" / "s-%d.tar", **options)
    assert first.shards == second.shards


def test_unreadable_images_are_reported_and_the_rest_written(images, tmp_path, caplog):
    image(images / "late.png", caption=None)
    (images / "p.2.png").write_bytes(b"not an image")
    (images / "p.3.txt").write_bytes(b"\xff")
    (images / "phone.heic").write_bytes(b"?")
    report, _ = run(images, tmp_path / "s.tar", workers=1)
    assert (report.samples, report.without_caption) == (4, 1)
    assert [failure["name"] for failure in report.failed] == ["p.2.png", "p.3.png", "phone.heic"]
    assert "image skipped: p.2.png: not an image" in caplog.text and "p.3.png: its caption is not UTF-8" in caplog.text
    assert json.loads((tmp_path / "index.json").read_text())["failed"] == report.failed


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_of_images_that_was_replaced_ends_it(tmp_path, workers):
    members = [("a.png", png(np.zeros((20, 20, 3), np.uint8))), ("a.txt", b"a cat")]
    path = write_tar(tmp_path / "images.tar", members)
    items = find_images(path)
    write_tar(tmp_path / "new.tar", members).replace(path)
    with pytest.raises(UserError, match=r"^.*images.tar: was replaced or changed [^\n]*$"):
        preencode(SampleEncoder(Model()), items, str(tmp_path / "set/s.tar"), size=16, batch_size=2, workers=workers)
    assert not list(tmp_path.glob("set/*"))


def test_no_readable_image_writes_nothing(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"?")
    with pytest.raises(UserError, match=r"none of 1 images can be read; the first: a\.png"):
        run(folder, tmp_path / "out" / "s.tar", caption="x")
    assert not (tmp_path / "out").exists()


def test_a_latent_without_a_posterior_is_stored_as_it_is(images, tmp_path):
    report, _ = run(images, tmp_path / "s.tar", Model(posterior=False))
    assert report.f8 == [(4, 2, 2)]


def test_values_too_large_for_float16_name_the_image(images, tmp_path):
    with pytest.raises(UserError, match=r"p\.0\.png: encodes to NaN or infinity; try --precision fp32"):
        run(images, tmp_path / "s-%d.tar", Model(scale=1e6))
    assert not list(tmp_path.glob("*.tar")) and not (tmp_path / "index.json").exists()


def test_existing_shards_are_kept_unless_told_otherwise(images, tmp_path):
    run(images, tmp_path / "s-%d.tar", shard_size=1)
    before = (tmp_path / "s-0.tar").read_bytes()
    with pytest.raises(UserError, match="--overwrite to replace 5 shards"):
        run(images, tmp_path / "s-%d.tar", caption="tom")
    assert (tmp_path / "s-0.tar").read_bytes() == before
    run(images, tmp_path / "s-%d.tar", caption="tom", overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [
        "s-0.tar",
        "s-1.tar",
    ]  # none of the old five is left
    (images.parent / "bad").mkdir()
    (images.parent / "bad" / "a.png").write_bytes(b"?")
    with pytest.raises(UserError, match="none of 1 images"):
        run(images.parent / "bad", tmp_path / "s-%d.tar", caption="tom", overwrite=True)
    assert (tmp_path / "index.json").exists() and (tmp_path / "s-0.tar").exists()
    with pytest.raises(UserError, match="this folder holds another set"):
        run(images, tmp_path / "t-%d.tar")


class Killed(BaseException):
    """The process ends here."""


class StopsAt(Model):
    """Raises at the image `number`, before which batches of one are encoded."""

    def __init__(self, number, error) -> None:
        super().__init__()
        self.number, self.error = number, error

    def get_learned_conditioning(self, texts):
        if texts != [""] and len(self.first_stage_model.calls) == self.number:
            raise self.error
        return super().get_learned_conditioning(texts)


@pytest.fixture
def captioned(tmp_path):
    """Five images, no two with one caption."""
    folder = tmp_path / "captioned"
    for number in range(5):
        image(folder / f"p{number}.png", caption="x" * number + "y")
    return folder


@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt()])
def test_a_set_that_was_cut_short_is_not_trained_on(captioned, tmp_path, caplog, error):
    out, options = tmp_path / "set" / "s-%d.tar", {"shard_size": 1, "batch_size": 1}
    run(captioned, out, **options)
    with pytest.raises(type(error)):
        run(captioned, out, StopsAt(3, error), overwrite=True, **options)
    shards = len(list(out.parent.glob("s-*.tar")))
    assert shards in (1, 2, 3)  # the thread that writes may be that far behind
    told = f"holds {shards} shards of an unfinished set, which training refuses" in caplog.text
    assert told == isinstance(error, KeyboardInterrupt)
    with pytest.raises(UserError, match="the set is unfinished"):
        WebDataNpyModuleFromConfig(1, str(out.parent)).setup("fit")
    run(captioned, out, **options)
    data = WebDataNpyModuleFromConfig(1, str(out.parent), null_cond_dropout=0.5)
    data.setup("fit")
    assert len(data.train_dataloader()) == 5


def test_an_interrupt_before_anything_is_written_leaves_the_old_set(captioned, tmp_path, caplog):
    out = tmp_path / "set" / "s-%d.tar"
    with pytest.raises(KeyboardInterrupt):
        run(captioned, out, StopsAt(1, KeyboardInterrupt()), batch_size=1)
    assert not out.parent.exists() and "holds no finished shard" in caplog.text
    run(captioned, out)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        run(captioned, out, StopsAt(0, KeyboardInterrupt()), overwrite=True)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    assert "the 2 shards in" in caplog.text and "are unchanged" in caplog.text


def test_a_set_that_was_killed_before_its_first_shard_needs_no_overwrite(images, tmp_path):
    write_index(tmp_path, {"out": "s-%d.tar", "complete": False, "shards": []})
    with pytest.raises(UserError, match="this folder holds another set"):
        run(images, tmp_path / "t-%d.tar")
    run(images, tmp_path / "s-%d.tar")
    assert read_index(tmp_path)["complete"]


def test_a_size_that_the_model_cannot_halve_is_refused(images, tmp_path):
    with pytest.raises(UserError, match="--size 24: height and width must be multiples of 16 pixels"):
        run(images, tmp_path / "s.tar", size=24)


def test_a_model_that_reads_no_captions_is_refused():
    model = Model()
    model.cond_stage_model.key = "t5"
    with pytest.raises(UserError, match="reads no captions"):
        SampleEncoder(model)


def first_values(encodings):
    return [int(encoding.arrays[CONTEXT][0, 0]) for encoding in encodings]


def test_preencode_counts_and_names_captions_that_are_cut(images, tmp_path, caplog):
    model = Model()
    model.cond_stage_model = SimpleNamespace(tokenizer=ClipTokenizer(8), to=lambda *_: None)
    (images / "p.2.txt").write_text("one two three four five six seven")
    report, _ = run(images, tmp_path / "s-%d.tar", model, flip=True)
    index = read_index(tmp_path)
    assert index["captions_cut"] == 1 and index["cut"] == report.cut == [{"name": "p.2.png", "tokens": 7}]
    assert "1 captions have more tokens than the text encoder reads and are cut: p.2.png (7)" in caplog.text


def test_preencode_stores_every_encoding_of_a_model(images, tmp_path):
    class Two(Model):
        def encode_captions(self, texts):
            hidden = self.get_learned_conditioning(texts)
            return {CONTEXT: hidden, POOLED: -hidden[:, 0]}

    run(images, tmp_path / "s-%d.tar", Two())
    stored = ShardDataset([tmp_path / "s-1.tar"], extra=[POOLED])[1]
    assert stored[POOLED].tolist() == [-6] * 6 and stored["t5"].shape == (7, 6) and stored[POOLED].dtype == np.float16
    assert (npy.decode(bytearray((tmp_path / "null.pooled.npy").read_bytes()), "null") == -1).all()
    index = read_index(tmp_path)
    assert index["pooled"] == [6] and index["members"] == ["f8", "t5", "pooled"]
    data = WebDataNpyModuleFromConfig(5, str(tmp_path), extra_keys=[POOLED], null_cond_dropout=1.0)
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert (batch[POOLED] == -1).all() and batch[POOLED].shape == (5, 6) and (batch["t5"] == 1).all()


def test_captions_are_forgotten_in_the_order_of_their_use(monkeypatch):
    monkeypatch.setattr("ldm.encoding.encoder._CACHED_CAPTIONS", 2)
    encoder = SampleEncoder(Model())
    for texts in (["a", "bb"], ["a"], ["ccc"], ["a", "bb"]):
        assert [int(value.arrays[CONTEXT][0, 0]) for value in encoder.captions(texts)] == [
            len(text) + 1 for text in texts
        ]
    assert encoder.model.texts == ["a", "bb", "ccc", "bb"]
    assert [int(value.arrays[CONTEXT][0, 0]) for value in encoder.captions(["dddd", "a", "eeeee"])] == [
        5,
        2,
        6,
    ]  # more than are kept


def test_keys_have_no_dot_and_sort_by_number():
    assert sample_key(7, "sub/my.photo (1).jpg") == "000007_my_photo_1_"
    assert sample_key(0, "写真.png") == "000000__"
