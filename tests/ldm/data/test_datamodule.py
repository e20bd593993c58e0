import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.data.config_module import DataModuleFromConfig
from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.shards import npy
from ldm.util import UserError
from tests.ldm.shard_files import sample_members, write_set, write_tar

TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class Recorder(pl.LightningModule):
    """Notes the keys of each batch; after `stop` batches, if given, saves a checkpoint and stops."""

    first_stage_key, cond_stage_key = "f8", "t5"

    def __init__(self, stop=None, checkpoint=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop, self.checkpoint, self.seen, self.validated = stop, checkpoint, [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["__key__"], batch["t5"].float().sum((1, 2)).tolist()))
        return self.weight * batch["f8"].float().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.seen) == self.stop:
            self.trainer.save_checkpoint(self.checkpoint)
            self.trainer.should_stop = True

    def validation_step(self, batch, batch_idx):
        self.validated += batch["__key__"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def check_batch_shapes(self, shapes):
        self.shapes = shapes
        if shapes["f8"][0] not in (4, 8):
            raise UserError(f"f8 has {shapes['f8'][0]} channels")


def fit(module, data, folder, ckpt_path=None, **options):
    options = {"max_epochs": 3, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(**TRAINER, default_root_dir=folder, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 12, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("stop", "num_workers"), [(1, 0), (4, 0), (6, 2), (11, 0)])
def test_a_stopped_fit_resumes_with_the_batches_it_has_not_seen(shard_set, tmp_path, stop, num_workers, limit):
    def data():
        options = {"null_cond_dropout": 0.4, "num_workers": num_workers, "seed": 3}
        return WebDataNpyModuleFromConfig(3, shard_set, val_urls=shard_set, **options)

    whole = Recorder()
    fit(whole, data(), tmp_path, **limit)
    assert len(whole.seen) == 12
    assert sorted(key for _, keys, _ in whole.seen[:4] for key in keys) == [f"{n:06d}" for n in range(10)]

    first, second = Recorder(stop, tmp_path / "last.ckpt"), Recorder()
    fit(first, data(), tmp_path, **limit)
    fit(second, data(), tmp_path, tmp_path / "last.ckpt", **limit)
    assert first.seen + second.seen == whole.seen


def test_every_checkpoint_of_a_fit_resumes_exactly(shard_set, tmp_path):
    """Checkpoints written after each step, as a callback does it, with validation in between."""

    def data():
        return WebDataNpyModuleFromConfig(3, shard_set, val_urls=shard_set, seed=3)

    whole = Recorder()
    saver = ModelCheckpoint(tmp_path / "all", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, data(), tmp_path, callbacks=[saver], enable_checkpointing=True, val_check_interval=2)
    for step in range(1, 12):
        resumed = Recorder()
        fit(resumed, data(), tmp_path, tmp_path / "all" / f"step={step}.ckpt", val_check_interval=2)
        assert resumed.seen == whole.seen[step:], step


def test_a_resumed_run_keeps_the_seed_of_its_order(shard_set, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    whole, first, second = Recorder(), Recorder(2, tmp_path / "last.ckpt"), Recorder()
    fit(whole, WebDataNpyModuleFromConfig(3, shard_set), tmp_path)
    fit(first, WebDataNpyModuleFromConfig(3, shard_set), tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "23")
    fit(second, WebDataNpyModuleFromConfig(3, shard_set), tmp_path, tmp_path / "last.ckpt")
    assert first.seen + second.seen == whole.seen


def test_a_position_is_not_one_in_another_set_of_as_many_samples(shard_set, tmp_path):
    def loader(urls):
        data = WebDataNpyModuleFromConfig(3, urls)
        data.setup("fit")
        return data.train_dataloader()

    members = [member for number in range(50, 60) for member in sample_members(number)]
    state = loader(shard_set).state_dict() | {"batch": 2}
    for urls, start in ((shard_set, 2), (str(write_tar(tmp_path / "other.tar", members)), 0)):
        other = loader(urls)
        other.load_state_dict(state)
        assert other.batch_sampler.start == start


def batches(data, split="train"):
    data.setup()
    return list(getattr(data, f"{split}_dataloader")())


def test_batches_are_tensors_as_stored_and_lists_of_strings(shard_set):
    first = batches(WebDataNpyModuleFromConfig(4, shard_set, shuffle=False))[0]
    assert first["f8"].shape == (4, 8, 4, 4) and first["f8"].dtype == torch.float16
    assert first["t5"].shape == (4, 7, 6) and first["t5"].dtype == torch.float16
    assert first["txt"] == [f"caption {n}" for n in range(4)]
    assert first["__key__"] == [f"{n:06d}" for n in range(4)]


def test_every_split_has_its_own_set(tmp_path):
    urls = [write_set(tmp_path / name, count) for name, count in (("a", 4), ("b", 3), ("c", 2))]
    data = WebDataNpyModuleFromConfig(2, *urls)
    assert [sum(len(b["txt"]) for b in batches(data, split)) for split in ("train", "val", "test")] == [4, 3, 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fewer_samples_than_workers(tmp_path):
    data = WebDataNpyModuleFromConfig(4, write_set(tmp_path, 2), num_workers=4)
    assert [sorted(batch["__key__"]) for batch in batches(data)] == [["000000", "000001"]]


def test_images_of_one_size_share_a_batch(tmp_path):
    shapes = [(4, 4, 4), (4, 2, 8)] * 4
    members = [member for number, shape in enumerate(shapes) for member in sample_members(number, shape)]
    data = WebDataNpyModuleFromConfig(3, str(write_tar(tmp_path / "a.tar", members)))
    assert sorted(len(batch["f8"]) for batch in batches(data)) == [1, 1, 3, 3]


def test_images_of_a_rare_size_do_not_go_missing_in_silence(tmp_path, caplog):
    shapes = [(4, 4, 4)] * 6 + [(4, 2, 8)] * 2 + [(4, 8, 2)]
    members = [member for number, shape in enumerate(shapes) for member in sample_members(number, shape)]
    urls = str(write_tar(tmp_path / "a.tar", members))
    assert sum(len(batch["txt"]) for batch in batches(WebDataNpyModuleFromConfig(3, urls))) == 9
    assert not caplog.records
    assert sum(len(batch["txt"]) for batch in batches(WebDataNpyModuleFromConfig(3, urls, drop_last=True))) == 6
    assert "training data: 3 of 9 samples are unused" in caplog.text and "2 of 3 sizes" in caplog.text
    assert "drop_last True" in caplog.text


def test_dropped_captions_are_the_stored_empty_one(tmp_path):
    data = WebDataNpyModuleFromConfig(50, write_set(tmp_path, 400), null_cond_dropout=0.25, num_workers=2, seed=1)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        dropped = {}
        for batch in loader:
            for key, t5, text in zip(batch["__key__"], batch["t5"], batch["txt"], strict=True):
                dropped[key] = bool((t5 == -1).all())
                assert dropped[key] or (t5 == int(key) + 0.5).all()
                assert text == ("" if dropped[key] else f"caption {int(key)}")
        assert len(dropped) == 400 and 70 < sum(dropped.values()) < 130
        epochs.append(dropped)
    assert epochs[0] != epochs[1]


def test_validation_keeps_its_captions(shard_set):
    data = WebDataNpyModuleFromConfig(4, shard_set, shard_set, null_cond_dropout=1.0)
    assert all((batch["t5"] == -1).all() for batch in batches(data))
    assert not any((batch["t5"] == -1).any() for batch in batches(data, "val"))


def test_captions_as_the_condition_are_dropped_as_text(shard_set):
    data = WebDataNpyModuleFromConfig(4, shard_set, cond_stage_key="txt", null_cond_dropout=1.0)
    assert [text for batch in batches(data) for text in batch["txt"]] == [""] * 10


@pytest.mark.parametrize(
    ("null", "message"),
    [
        (None, "not found.*preencode"),
        (np.zeros((7, 6), np.float16), "all zeros"),
        (np.ones((7, 5), np.float16), r"shape \(7, 5\), but t5 in the shards has \(7, 6\)"),
    ],
)
def test_the_empty_caption_must_be_there_and_fit(shard_set, tmp_path, null, message):
    path = tmp_path / "shards" / "null.t5.npy"
    path.unlink()
    if null is not None:
        path.write_bytes(npy.encode(null))
    with pytest.raises(UserError, match=message):
        batches(WebDataNpyModuleFromConfig(4, shard_set, null_cond_dropout=0.1))
    assert len(batches(WebDataNpyModuleFromConfig(4, shard_set))) == 3


def test_it_says_what_it_found_and_asks_the_model(shard_set, tmp_path, caplog):
    module = Recorder()
    with caplog.at_level(logging.INFO):
        fit(module, WebDataNpyModuleFromConfig(4, shard_set), tmp_path, max_epochs=1)
    assert "training data: 10 samples in 2 shards, f8 8x4x4 float16, t5 7x6 float16" in caplog.text
    assert module.shapes == {"f8": (8, 4, 4), "t5": (7, 6)}
    wrong = write_set(tmp_path / "wrong", 2, f8_shape=(3, 4, 4))
    with pytest.raises(UserError, match="3 channels"):
        fit(Recorder(), WebDataNpyModuleFromConfig(4, wrong), tmp_path)


def test_the_models_keys_name_the_members(tmp_path):
    module = Recorder()
    module.first_stage_key = "latent"
    with pytest.raises(UserError, match=r"no member 'latent\.npy'"):
        fit(module, WebDataNpyModuleFromConfig(4, write_set(tmp_path, 2)), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training_urls": None}, "training_urls is missing"),
        ({"batch_size": 20, "drop_last": True}, "give no batch"),
        ({"null_cond_dropout": 1.5}, "null_cond_dropout 1.5: give a number from 0 to 1"),
        ({"batch_size": 0}, "batch_size 0: give a whole number of at least 1"),
        ({"batch_size": "4"}, "batch_size '4': give"),
        ({"batch_size": 4.0}, r"batch_size 4\.0: give"),
        ({"batch_size": None}, "batch_size None: give"),
        ({"batch_size": True}, "batch_size True: give"),
        ({"num_workers": "2"}, "num_workers '2': give"),
        ({"seed": -1}, "seed -1: give a whole number of at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(shard_set, options, message):
    with pytest.raises(UserError, match=message):
        batches(WebDataNpyModuleFromConfig(**{"batch_size": 4, "training_urls": shard_set, **options}))


@pytest.mark.parametrize("batch_size", ["4", 4.0, None])
def test_a_batch_size_of_another_type_is_refused_for_every_data_module(batch_size):
    with pytest.raises(UserError, match=f"batch_size {batch_size!r}: give a whole number"):
        DataModuleFromConfig(batch_size, train={"target": "main.Anything"})


def test_the_recipes_params_are_taken_as_they_stand(shard_set):
    data = WebDataNpyModuleFromConfig(
        batch_size=4,
        num_workers=0,
        training_urls=shard_set,
        val_urls=None,
        test_urls=None,
        null_cond_dropout=0.1,
    )
    assert sum(len(batch["txt"]) for batch in batches(data)) == 10
    assert batches(data, "val") == batches(data, "test") == []
