"""Tests of the command `tools/make_prior.py`: from prompts, from images, with and without predictions."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ldm.config.load import load_config
from ldm.data.dropout import EpochItems
from ldm.data.prior import WithPrior
from ldm.encoding.teacher import Teacher
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.text_to_image import Request, latent_shape, sample_latents
from ldm.release.load import load_release
from ldm.shards import npy
from ldm.shards.reader import ShardDataset
from ldm.shards.sample import TEACHER_KEYS
from ldm.shards.writer import ShardWriter
from tests.conftest import RELEASE_CONFIG, ROOT

TOOL = Path(__file__).resolve().parents[2] / "tools/make_prior.py"
FAST = ("--steps", 2, "--H", 32, "--W", 32, "--scale", 2)
AS_TRAINED = ["first_stage_key=f8", "cond_stage_key=txt", "prior_target=teacher"]


@pytest.fixture
def make_prior(tiny_release, monkeypatch, tmp_path, run_tool):
    """Return a function that runs the command in this process, and returns None or the error line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        sampling = () if "--shards" in arguments else FAST
        return run_tool(TOOL, "--ckpt", tiny_release, "--config", RELEASE_CONFIG, *sampling, *arguments)

    return call


@pytest.fixture(scope="module")
def model(tiny_release):
    return load_release(tiny_release, load_config([RELEASE_CONFIG], [f"model.params.{line}" for line in AS_TRAINED]))


def write_images(model, folder, sizes=((8, 8),) * 5, width=None):
    """Write posteriors with their number as mean and a standard deviation of 1; return the folder."""
    with ShardWriter(str(folder / "p-%d.tar"), 1000) as writer:
        for number, size in enumerate(sizes):
            mean = np.full((model.channels, *size), number, np.float16)
            t5 = model.get_learned_conditioning([f"dog {number}"])[0].half().numpy()[:, :width]
            members = {"f8.npy": npy.encode(np.concatenate([mean, np.zeros_like(mean)])), "t5.npy": npy.encode(t5)}
            writer.write(f"dog{number}", {**members, "txt": f"dog {number}".encode()})
    return folder


def self_loss(model, path):
    """Return the prior loss of the model that was the teacher of the shards at `path`."""
    prior = ShardDataset([path], extra=TEACHER_KEYS)
    items = WithPrior(EpochItems(ShardDataset([path])), prior, None, model.num_timesteps)
    count = len(prior)
    batch = default_collate([items[(turn, number)] for turn in (0, 1) for number in range(2 * count)])
    with torch.no_grad():
        return model.shared_step(batch)[1]["val/loss_prior"].item()


def test_shards_hold_the_sampled_latents(make_prior, model, tmp_path):
    prompts = ("--prompt", "red apple", "a bee", "--n", 2, "--seed", 7)
    assert make_prior(*prompts, "--batch-size", 3, "--shard-size", 3, "--out", "out/s-%03d.tar") is None
    names = ["index.json", "null.t5.npy", "s-000.tar", "s-001.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    requests = [Request("red apple", 7), Request("red apple", 8), Request("a bee", 9), Request("a bee", 10)]
    settings = {"steps": 2, "scale": 2.0, "sampler": "ddim", "eta": 0.0}
    latents = sample_latents(model, requests, latent_shape(model, 32, 32), **settings, batch_size=3, verbose=False)
    dataset = ShardDataset(sorted((tmp_path / "out").glob("*.tar")), extra=["json"])
    for request, latent, sample in zip(requests, latents, (dataset[n] for n in range(4)), strict=True):
        assert sample["f8"].dtype == sample["t5"].dtype == np.float16 and sample["txt"] == request.prompt
        np.testing.assert_array_equal(sample["f8"], (latent / model.scale_factor).half().numpy())
        expected = model.get_learned_conditioning([request.prompt])[0].numpy()
        np.testing.assert_allclose(sample["t5"], expected, rtol=2e-3, atol=2e-3)
        sizes = {"original_size": [32, 32], "crop_top_left": [0, 0], "target_size": [32, 32]}
        assert sample["json"] == {"prompt": request.prompt, "seed": request.seed, **settings, **sizes}
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert (index["complete"], index["samples"], index["teacher"]) == (True, 4, 0)
    assert (index["scale_factor"], index["parameterization"]) == (model.scale_factor, model.parameterization)
    assert len(index["shards"]) == 2


def test_the_teacher_has_no_loss_on_its_own_predictions(make_prior, model, tmp_path):
    assert make_prior("--prompt", "red apple", "--n", 6, "--teacher", 2, "--null-share", 0.5, "--out", "s.tar") is None
    dataset = ShardDataset([tmp_path / "s.tar"], extra=TEACHER_KEYS)
    captions = [dataset[number]["txt"] for number in range(6)]
    assert set(captions) == {"red apple", ""}
    null = npy.decode(bytearray((tmp_path / "null.t5.npy").read_bytes()), "null")
    assert all((np.array_equal(dataset[n]["t5"], null)) == (captions[n] == "") for n in range(6))
    assert self_loss(model, tmp_path / "s.tar") < 1e-5


def test_images_get_a_latent_seeded_by_key_and_predictions(make_prior, model, tmp_path):
    images = write_images(model, tmp_path / "images")
    for out, size in (("one", 2), ("two", 5)):
        options = ("--teacher", 2, "--null-share", 0, "--batch-size", size)
        assert make_prior("--shards", images, *options, "--out", f"{out}/s.tar") is None
    one, two = (ShardDataset([tmp_path / out / "s.tar"], extra=TEACHER_KEYS) for out in ("one", "two"))
    for number in range(5):
        sample, again = one[number], two[number]
        assert sample["__key__"] == f"dog{number}" and sample["txt"] == f"dog {number}"
        assert all(np.array_equal(sample[key], again[key]) for key in ("f8", "t5", "t", "noise"))
        np.testing.assert_allclose(sample["prediction"], again["prediction"], rtol=2e-3, atol=2e-3)
        spread = sample["f8"].astype(np.float32) - number
        assert sample["f8"].shape == (model.channels, 8, 8) and abs(spread.mean()) < 0.4 and 0.7 < spread.std() < 1.3
    assert self_loss(model, tmp_path / "one/s.tar") < 1e-5


def test_prompts_on_images_have_latents_of_the_images_and_predictions_for_the_prompts(make_prior, model, tmp_path):
    images = write_images(model, tmp_path / "images", ((8, 8),) * 2)
    prompts = ("red apple", "a house")
    options = ("--teacher", 2, "--null-share", 0, "--n", 2, "--batch-size", 3)
    assert make_prior("--shards", images, "--prompt", *prompts, *options, "--out", "s.tar") is None
    dataset = ShardDataset([tmp_path / "s.tar"], extra=TEACHER_KEYS)
    assert [dataset[number]["txt"] for number in range(4)] == [prompts[0]] * 2 + [prompts[1]] * 2
    for number in range(4):
        spread = dataset[number]["f8"].astype(np.float32) - number % 2  # image 0 has the mean 0, image 1 the mean 1
        assert abs(spread.mean()) < 0.4 and 0.7 < spread.std() < 1.3
    assert not np.array_equal(dataset[0]["f8"], dataset[2]["f8"])  # another latent of the same posterior
    expected = model.get_learned_conditioning([prompts[1]])[0].detach().numpy().astype(np.float16)
    np.testing.assert_allclose(dataset[3]["t5"], expected, rtol=2e-3, atol=2e-3)
    assert self_loss(model, tmp_path / "s.tar") < 1e-5
    assert json.loads((tmp_path / "index.json").read_text())["samples"] == 4


def test_an_unfinished_set_is_not_continued_with_other_images_of_equal_size(make_prior, model, tmp_path, monkeypatch):
    images = write_images(model, tmp_path / "images", ((8, 8),) * 2)
    options = ("--prompt", "a", "b", "--teacher", 1, "--batch-size", 1, "--shard-size", 1, "--out", "s-%d.tar")
    answers = Teacher.answers

    def interrupted(self, numbers, *arguments):
        if 1 in numbers:
            raise KeyboardInterrupt
        return answers(self, numbers, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Teacher, "answers", interrupted)
        assert make_prior("--shards", images, *options) == 130
    [shard] = images.glob("*.tar")
    before = shard.stat().st_size
    content = shard.read_bytes()
    shard.write_bytes(content.replace(np.full(64, 1, np.float16).tobytes(), np.full(64, 2, np.float16).tobytes()))
    assert shard.stat().st_size == before and shard.read_bytes() != content
    message = make_prior("--shards", images, *options)
    assert re.search(r"the unfinished set was begun with .*images", message)


def test_keep_samples_a_class_its_neighbours_and_general_prompts(make_prior, tmp_path):
    assert make_prior("--keep", "clock", "--general", 1, "--steps", 1, "--batch-size", 16, "--null-share", 0) is None
    index = json.loads((tmp_path / "data/kept/index.json").read_text())
    assert (index["samples"], index["teacher"]) == (13, 8)
    dataset = ShardDataset([tmp_path / "data/kept/000000.tar"], extra=TEACHER_KEYS)
    captions = [dataset[number]["txt"] for number in range(13)]
    assert captions[:4] == ["a photo of a clock", "a drawing of a clock", "a photo of a watch", "a drawing of a watch"]
    assert captions[12] == (ROOT / "data/prompts/general.txt").read_text().splitlines()[0]


def test_teacher_power_stores_low_noise_and_is_in_the_index(make_prior, tmp_path):
    options = ("--teacher", 4, "--null-share", 0, "--steps", 2)
    assert make_prior("--prompt", "red apple", "--n", 3, *options, "--teacher-power", 3, "--out", "s.tar") is None
    assert json.loads((tmp_path / "index.json").read_text())["teacher_power"] == 3
    dataset = ShardDataset([tmp_path / "s.tar"], extra=TEACHER_KEYS)
    # the quarters of the cumulative distribution 1 − (1 − τ)⁴ end at τ = 1 − ⁴√(3/4), 1 − ⁴√(1/2), 1 − ⁴√(1/4)
    ends = [0, 69, 159, 292, 999]
    assert all(
        low <= t <= high for n in range(3) for t, low, high in zip(dataset[n]["t"], ends, ends[1:], strict=False)
    )


def test_stored_latents_are_used_unchanged(make_prior, model, tmp_path):
    assert make_prior("--prompt", "red apple", "--n", 3, "--out", "sampled/s.tar") is None
    assert make_prior("--shards", "sampled", "--teacher", 2, "--out", "taught/s.tar") is None
    sampled, taught = (ShardDataset([tmp_path / name / "s.tar"]) for name in ("sampled", "taught"))
    assert all(np.array_equal(sampled[n]["f8"], taught[n]["f8"]) for n in range(3))


OPTIONS = ("--prompt", "red apple", "--n", 5, "--batch-size", 2, "--shard-size", 2, "--teacher", 2)


@pytest.fixture
def whole(make_prior, tmp_path):
    """Return the files of the set that an uninterrupted command makes."""
    assert make_prior(*OPTIONS, "--out", "whole/s-%d.tar") is None
    return {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def interrupt_at(monkeypatch, call):
    """Interrupt the sampler at its batch number `call`; return the list that counts the batches."""
    sample, calls = DDIMSampler.sample, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(DDIMSampler, "sample", interrupted)
    return calls


def test_make_prior_continues_after_an_interruption(make_prior, whole, tmp_path, monkeypatch):
    out = (*OPTIONS, "--out", "out/s-%d.tar")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        assert make_prior(*out) == 130
    assert not json.loads((tmp_path / "out/index.json").read_text())["complete"]
    for changed in (("--n", 6), ("--seed", 1), ("--teacher", 3), ("--steps", 3), ("--null-share", 0.5)):
        message = make_prior(*out, *changed)
        assert re.search(r"the unfinished set was begun with .*give the same command to resume", message)
    calls = interrupt_at(monkeypatch, 100)
    assert make_prior(*out) is None and len(calls) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_make_prior_is_shared_among_processes(make_prior, whole, tmp_path, monkeypatch):
    """Rank 1 makes its share of a set that rank 0 began. Then rank 0, started again, completes the set."""
    out = (*OPTIONS, "--out", "out/s-%d.tar")
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("RANK", "0")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 1)
        assert make_prior(*out) == 130  # the set exists now; the other ranks wait for it
    monkeypatch.setenv("RANK", "1")
    assert make_prior(*out) is None
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["s-1.tar"]
    monkeypatch.setenv("RANK", "0")
    assert make_prior(*out) is None
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert "not possible with several processes" in make_prior(*out, "--overwrite")


def test_make_prior_names_truncated_prompts(make_prior, caplog):
    assert make_prior("--prompt", "a cat " * 50, "--out", "s.tar") is None
    assert "1 prompts are longer than 75 tokens and are cut: 'a cat a cat" in caplog.text
    assert "(100 tokens)" in caplog.text


@pytest.fixture(scope="module")
def sets(model, tmp_path_factory):
    """Make a folder with sets of shards: `images`, the same ones again, images of two sizes, and narrow encodings."""
    folder = tmp_path_factory.mktemp("sets")
    write_images(model, folder / "images")
    write_images(model, folder / "again")
    write_images(model, folder / "sizes", [(8, 8), (8, 16)])
    write_images(model, folder / "narrow", width=8)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompt: give --prompt or --from-file"),
        (("--prompt", "x", "--ckpt", "none.ckpt"), r"none\.ckpt"),
        (("--prompt", "x", "--out", "s"), r"--out s: name shards"),
        (("--prompt", "x", "--n", 0), "--n 0"),
        (("--prompt", "x", "--seed", -1), "--seed -1"),
        (("--prompt", "x", "--H", 33), "--H 33"),
        (("--prompt", "x", "--teacher", -1), "--teacher -1"),
        (("--prompt", "x", "--teacher", 1001), "--teacher 1001: must be 1 to 1000 timesteps"),
        (("--prompt", "x", "--teacher", 1, "--null-share", 2), "--null-share 2"),
        (("--prompt", "x", "--config", "demo_tiny.yaml"), "reads no captions"),
        (("--shards", "images"), "--shards images: images need the model's predictions beside them; give --teacher"),
        (("--shards", "images", "--prompt", "x"), "--shards images: images need the model's predictions"),
        (("--shards", "images", "--keep", "cat", "--teacher", 0), "--shards images: images need the model's predic"),
        (("--shards", "images", "--prompt", "x", "--teacher", 1, "--steps", 9), "is sampled; leave out --steps$"),
        (("--shards", "images", "--prompt", "x", "--teacher", 1, "--clip-skip", 2), "leave out --clip-skip$"),
        (("--prompt", "x", "--null-share", 0.5), "--null-share has no effect without --teacher"),
        (("--prompt", "x", "--general", 5), "--general 5: belongs to --keep"),
        (("--keep", "cat", "--from-file", "x"), "--keep cat: has prompts of its own; leave out --from-file"),
        (("--keep", "qqq"), "--keep 'qqq': .*neighbours.txt has no such class"),
        (("--prompt", "x", "--teacher-power", 1), "--teacher-power has no effect without --teacher"),
        (("--prompt", "x", "--teacher", 1, "--teacher-power", -1), "--teacher-power -1.0: give a number of at least 0"),
        (("--shards", "images", "--teacher", 1, "--n", 2, "--eta", 1), "nothing is sampled; leave out --n and --eta"),
        (("--shards", "images", "--teacher", 1, "--H", 64), "leave out --H$"),
        (("--shards", "pipe:cat x", "--teacher", 1), "pipe:cat x: is a stream; give local shards"),
        (("--shards", "nowhere.tar", "--teacher", 1), r"nowhere\.tar"),
        (("--shards", "images", "--teacher", 1, "--out", "images/p-%d.tar", "--overwrite"), "would replace"),
        (("--shards", "sizes", "--teacher", 1), "images of 2 sizes; give shards with images of one size"),
        (
            ("--shards", "{images,again}/*.tar", "--teacher", 1),
            "two samples have the key 'dog0'; make a prior of each part",
        ),
        (("--shards", "narrow", "--teacher", 1), "context_dim is"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(make_prior, sets, tmp_path, arguments, message):
    shutil.copytree(sets, tmp_path, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    error = make_prior("--out", "out/s-%d.tar", *arguments)
    assert isinstance(error, str) and re.search(f"^error: .*{message}", error) and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before
