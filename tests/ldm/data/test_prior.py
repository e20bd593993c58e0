"""The prior's samples behind the training samples: which, in what form, and again after a resume."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from ldm.data.batch_sampler import EpochBatchSampler
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.prior import PriorBatchSampler, check_taught
from ldm.data.stream import ShardStream
from ldm.shards import npy
from ldm.shards.index import write_index
from ldm.shards.open import open_shards
from ldm.util import UserError
from tests.ldm.data.test_datamodule import Recorder, batches, fit
from tests.ldm.shard_files import write_set, write_tar


class Remembering(Recorder):
    """A recorder that asks for a teacher's predictions, and notes them."""

    prior_target, num_timesteps = "teacher", 100

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["__key__"], batch["t"].tolist(), batch["noise"].sum().item()))
        return self.weight * batch["prediction"].float().mean()


def write_taught(folder, count, k=3, latent=(4, 4, 4), **changes):
    """Write a prior whose sample n has t = 10 n + k, noise n + k / 10 and prediction -(n + k / 10)."""
    members = []
    for n in range(count):
        values = (n + np.arange(k, dtype=np.float16) / 10).reshape(k, 1, 1, 1) * np.ones(latent, np.float16)
        arrays = {
            "f8": np.full(latent, n, np.float16),
            "t5": np.full((7, 6), n, np.float16),
            "t": (10 * n + np.arange(k)).astype(np.int32),
            "noise": values,
            "prediction": -values,
        } | changes
        members += [(f"p{n}.{key}.npy", npy.encode(array)) for key, array in arrays.items() if array is not None]
    return str(write_tar(folder / "taught.tar", members))


@pytest.fixture
def training(tmp_path):
    return write_set(tmp_path / "training", 10)


@pytest.fixture
def prior(tmp_path):
    return write_set(tmp_path / "prior", 7, f8_shape=(4, 4, 4))


def sampler(samples=5, ratio=1.0, batch_size=4, **options):
    return PriorBatchSampler(EpochBatchSampler([np.arange(10)], batch_size, **options), samples, ratio)


def test_each_batch_ends_with_its_share_of_an_endless_row_of_permutations():
    ours, found = sampler(ratio=0.5, seed=3, shuffle=True), []
    for epoch in range(5):
        ours.set_epoch(epoch)
        plain = EpochBatchSampler([np.arange(10)], 4, seed=3, shuffle=True)
        plain.set_epoch(epoch)
        for batch, alone in zip(ours, plain, strict=True):
            assert batch[:-2] == alone
            found += batch[-2:]
    turns = [found[i : i + 5] for i in range(0, 30, 5)]
    assert [{turn for turn, _ in items} for items in turns] == [{n} for n in range(6)]
    assert all({number for _, number in items} == set(range(10, 15)) for items in turns)
    assert len({tuple(number for _, number in items) for items in turns}) > 1


def test_the_position_follows_from_epoch_and_batch():
    whole, part = sampler(seed=1, shuffle=True), sampler(seed=1, shuffle=True)
    whole.set_epoch(2)
    part.set_epoch(2)
    part.start = 1
    assert list(part) == list(whole)[1:]


def test_ranks_share_the_prior_out():
    one = [number for batch in sampler(samples=100, batch_size=4) for number in batch[-4:]]
    two = [list(sampler(samples=100, batch_size=2, world=2, rank=rank)) for rank in range(2)]
    assert [item for step in zip(*two, strict=True) for batch in step for item in batch[-2:]] == one


def test_a_batch_mixes_both_sets(training, prior):
    data = WebDataNpyModuleFromConfig(4, training, prior_urls=prior, prior_ratio=0.5, seed=1)
    found = batches(data)
    assert [batch["is_prior"].tolist() for batch in found] == [[False] * n + [True] * 2 for n in (4, 4, 2)]
    entries = {"__key__", "f8", "t5", "txt", "stream", "is_prior"}
    assert found[0]["is_prior"].dtype == torch.bool and set(found[0]) == entries
    for batch in found:
        for row in range(len(batch["txt"])):
            number = int(batch["__key__"][row])
            assert batch["txt"][row] == f"caption {number}" and (batch["t5"][row] == number + 0.5).all()
            # the prior's latents have become posteriors without spread, those of the training set are as they were
            assert (batch["f8"][row][:4] == number).all()
            assert (batch["f8"][row][4:] == (-30 if batch["is_prior"][row] else number)).all()
    assert "is_prior" not in batches(WebDataNpyModuleFromConfig(4, training))[0]


def test_each_sample_names_its_random_numbers_by_run_epoch_and_set(training, prior, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = WebDataNpyModuleFromConfig(4, training, val_urls=training, prior_urls=prior, prior_ratio=0.5, seed=1)
    named = {name for batch in batches(data) for name in batch["stream"]}
    assert {name for name in named if "prior" not in name} == {f"7/0/{number}" for number in range(10)}
    of_prior = {name for name in named if "prior" in name}
    assert len(of_prior) == 6 and all(name.startswith(("7/0/prior/", "7/1/prior/")) for name in of_prior)
    data.setup("validate")
    named = [name for batch in data.val_dataloader() for name in batch["stream"]]
    assert named == [f"held-out/{number}" for number in range(10)], "validation draws the same in every epoch"


def test_latents_to_train_on_beside_posteriors_to_remember(training, prior):
    for batch in batches(WebDataNpyModuleFromConfig(4, prior, prior_urls=training)):
        numbers = torch.tensor([int(key) for key in batch["__key__"]])
        spread = torch.where(batch["is_prior"], numbers, -30)
        assert batch["f8"].shape[1] == 8 and (batch["f8"][:, 4:].mean((1, 2, 3)) == spread).all()


def test_captions_of_the_prior_are_dropped_too(training, prior):
    data = WebDataNpyModuleFromConfig(4, training, prior_urls=prior, null_cond_dropout=0.5, seed=2)
    dropped = {(key, prior): text == "" for b in batches(data) for key, prior, text in zip(
        b["__key__"], b["is_prior"].tolist(), b["txt"], strict=True)}  # fmt: skip
    for is_prior in (False, True):
        assert {value for (_, prior), value in dropped.items() if prior == is_prior} == {True, False}


@pytest.mark.parametrize(("stop", "num_workers"), [(1, 0), (3, 0), (5, 2)])
def test_a_stopped_fit_resumes_with_the_same_prior_samples(training, prior, tmp_path, stop, num_workers):
    def data():
        options = {"null_cond_dropout": 0.4, "num_workers": num_workers, "seed": 3}
        return WebDataNpyModuleFromConfig(4, training, prior_urls=prior, **options)

    whole, first, second = Recorder(), Recorder(stop, tmp_path / "last.ckpt"), Recorder()
    fit(whole, data(), tmp_path)
    fit(first, data(), tmp_path)
    fit(second, data(), tmp_path, tmp_path / "last.ckpt")
    assert first.seen + second.seen == whole.seen


def test_a_changed_prior_starts_the_epoch_again(training, prior, tmp_path, caplog):
    def loader(**options):
        data = WebDataNpyModuleFromConfig(4, training, **options)
        data.setup("fit")
        return data.train_dataloader()

    state = loader(prior_urls=prior).state_dict() | {"epoch": 1, "batch": 2}
    for options, start in [
        ({"prior_urls": prior}, 2),
        ({"prior_urls": write_set(tmp_path / "smaller", 4)}, 0),
        ({"prior_urls": prior, "prior_ratio": 0.5}, 0),
    ]:
        other = loader(**options)
        other.load_state_dict(state)
        assert (other.batch_sampler.epoch, other.batch_sampler.start) == (1, start)
    assert "prior_samples was 7, is 4" in caplog.text and "prior_batch_size was 4, is 2" in caplog.text


def test_a_teachers_predictions_take_turns(training, tmp_path):
    data = WebDataNpyModuleFromConfig(4, training, prior_urls=write_taught(tmp_path, 4), null_cond_dropout=1.0)
    asked = {}
    module = Remembering()

    def note(batch, batch_idx):
        own, other = ~batch["is_prior"], batch["is_prior"]
        assert not batch["noise"][own].any() and not batch["prediction"][own].any() and not batch["t"][own].any()
        assert batch["txt"][: own.sum()] == [""] * own.sum() and not (batch["t5"][other] == -1).any()
        for t, noise, prediction, t5 in zip(
            *(batch[key][other] for key in ("t", "noise", "prediction", "t5")), strict=True
        ):
            number, k = divmod(t.item(), 10)
            assert (noise == np.float16(number + np.float16(k) / 10)).all() and (prediction == -noise).all()
            assert (t5 == number).all()
            asked.setdefault(number, []).append(k)
        return module.weight * 0

    module.training_step = note
    fit(module, data, tmp_path)
    assert set(asked) == set(range(4))
    assert all(sorted(ks[:3]) == [0, 1, 2] and ks[3:6] == ks[:3] for ks in asked.values())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_predictions_are_the_same_ones_after_a_resume(training, tmp_path, num_workers):
    prior = write_taught(tmp_path, 5)

    def data():
        return WebDataNpyModuleFromConfig(4, training, prior_urls=prior, num_workers=num_workers)

    whole, first, second = Remembering(), Remembering(4, tmp_path / "last.ckpt"), Remembering()
    fit(whole, data(), tmp_path)
    fit(first, data(), tmp_path)
    fit(second, data(), tmp_path, tmp_path / "last.ckpt")
    assert first.seen + second.seen == whole.seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_urls": "pipe:cat a.tar"}, r"pipe:cat a\.tar: is a stream; give local shards"),
        ({"prior_ratio": 0}, "prior_ratio 0: give a number above 0"),
        ({"prior_ratio": 0.1}, "prior_ratio 0.1: gives no prior sample for batch_size 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(training, prior, options, message):
    with pytest.raises(UserError, match=message):
        batches(WebDataNpyModuleFromConfig(4, training, **{"prior_urls": prior, **options}))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"f8_shape": (4, 4, 2)}, "f8 has sizes 4x2, but 4x4 in the training set; both must have one size"),
        ({"f8_shape": (3, 4, 4)}, "f8 has 3 channels, but 8 in the training set"),
        ({"t5_shape": (7, 5)}, r"t5 has shape \(7, 5\), but \(7, 6\) in the training set"),
    ],
)
def test_a_prior_of_other_shapes_is_refused(training, tmp_path, shapes, message):
    with pytest.raises(UserError, match=message):
        batches(WebDataNpyModuleFromConfig(4, training, prior_urls=write_set(tmp_path / "other", 4, **shapes)))


def test_streams_to_train_on_are_refused(training, prior, tmp_path):
    stream = f"pipe:cat {tmp_path}/training/set-000.tar"
    with pytest.raises(UserError, match="prior_urls needs training shards in local files"):
        batches(WebDataNpyModuleFromConfig(4, stream, prior_urls=prior))


@pytest.mark.parametrize("what", ["captions", "variants"])
def test_training_on_predictions_needs_one_caption_and_one_latent(training, what):
    dataset = open_shards(training)
    check_taught(dataset)
    setattr(dataset, f"has_several_{what}", True)
    with pytest.raises(UserError, match=f"the set has several {what}.*a stored prediction is of the first"):
        check_taught(dataset)


def test_training_on_predictions_needs_local_files(training):
    with pytest.raises(UserError, match="DirectConsistency needs training shards in local files, not streams"):
        check_taught(ShardStream([f"pipe:cat {training}/set-000.tar"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": None}, r"'p0' has no member 't\.npy'; write .* with tools/make_prior\.py --teacher"),
        ({"prediction": None}, r"no member 'prediction\.npy'; write .* with tools/make_prior\.py --teacher"),
        ({"t": np.ones(2, np.int32)}, r"shapes of the teacher do not match.*make_prior\.py"),
        ({"noise": np.ones((3, 4, 4, 2), np.float16)}, "shapes of the teacher do not match"),
        ({"t": np.ones(3, np.float32)}, "type is float32, not one of int32, int64"),
        ({"t": np.full(3, 100, np.int64)}, "t is 100; it must be a timestep of the model, 0 to 99"),
        ({"t": np.full(3, -1, np.int32)}, "t is -1"),
    ],
)
def test_predictions_that_are_missing_or_do_not_fit(training, tmp_path, changes, message):
    data = WebDataNpyModuleFromConfig(4, training, prior_urls=write_taught(tmp_path, 4, **changes))
    with pytest.raises(UserError, match=message):
        fit(Remembering(), data, tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"scale_factor": 0.182150006, "parameterization": "eps"}, None),  # a float32
        ({}, None),
        ({"scale_factor": 0.13025}, r"the teacher's scale_factor is 0\.13025, the model's 0\.18215; make the set anew"),
        ({"teacher_power": 0}, None),
        ({"teacher_power": 1.0}, "timesteps have the power 1, but timestep_config has 0; make .* no --teacher-power"),
        ({"parameterization": "v"}, "the teacher's parameterization is v, the model's eps"),
    ],
)
def test_predictions_that_mean_something_else_are_refused(training, tmp_path, index, message):
    data = WebDataNpyModuleFromConfig(4, training, prior_urls=write_taught(tmp_path / "taught", 4))
    write_index(tmp_path / "taught", {**index, "shards": [{"name": "taught.tar"}]})
    module = Remembering()
    module.scale_factor, module.parameterization = 0.18215, "eps"
    with pytest.raises(UserError, match=message) if message else nullcontext():
        fit(module, data, tmp_path)


def test_a_teacher_needs_a_prior(training, tmp_path):
    with pytest.raises(UserError, match=r"prior_target is teacher, but data\.params\.prior_urls names no shards"):
        fit(Remembering(), WebDataNpyModuleFromConfig(4, training), tmp_path)
