"""Tests that training refuses shards made by other encoders."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ldm.callbacks.encoders import SameEncoders
from ldm.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from ldm.config.load import build_model, load_config
from ldm.shards.reader import ShardDataset
from ldm.util import UserError
from tests.ldm.shard_files import write_set
from tests.training_runs import fixture_one_thread, fixture_train, the_run, write_index  # noqa: F401


@pytest.fixture
def made_by(tmp_path):
    """Return a function that gives the shards of the tiny run an index with digests."""
    return partial(write_index, tmp_path / "shards")


def started(train, tmp_path):
    """Return the checkpoint of a run of one step, with a text tower in its state, and its autoencoder's digest."""
    assert train("-l logs --max_steps 1") == 0
    path = the_run(tmp_path / "logs") / "checkpoints/last.ckpt"
    content = load_checkpoint(path)
    callbacks = {**content["callbacks"], "SameEncoders": {"text_tower": "t" * 64, "text_tower_2": "u" * 64}}
    save_checkpoint({**content, "callbacks": callbacks}, path)
    return path, weights_digest(content["state_dict"], "first_stage_model.")


@pytest.mark.slow
def test_the_encoders_of_the_checkpoint_must_be_those_of_the_set(train, made_by, tmp_path):
    checkpoint, autoencoder = started(train, tmp_path)
    resume = f"--resume {checkpoint} --max_steps"
    made_by(autoencoder="0" * 64, text_tower="t" * 64)
    assert "index.json: the set was made by another autoencoder (000000000000…)" in train_error(train, f"{resume} 2")
    made_by(autoencoder=autoencoder, text_tower="0" * 64)
    assert "index.json: the set was made by another text tower" in train_error(train, f"{resume} 2")
    made_by(autoencoder=autoencoder, text_tower="t" * 64, text_tower_2="0" * 64)
    assert "index.json: the set was made by another second text tower" in train_error(train, f"{resume} 2")
    made_by(autoencoder=autoencoder, text_tower="t" * 64)
    assert train(f"{resume} 2") == 0
    state = load_checkpoint(checkpoint)["callbacks"]["SameEncoders"]
    captions = {"max_tokens": 75, "clip_skip": 1}
    encoder = state.pop("autoencoder_used")
    assert state == {"text_tower": "t" * 64, "text_tower_2": "u" * 64, "autoencoder": autoencoder, **captions}
    made_by(autoencoder="0" * 64, autoencoder_used=encoder)  # a new decoder
    assert train(f"{resume} 2") == 0
    made_by(autoencoder=autoencoder, autoencoder_used="0" * 64)
    assert "index.json: the set was made by another autoencoder (000000000000…)" in train_error(train, f"{resume} 3")
    content = load_checkpoint(checkpoint)  # of a version that knew no digest of the encoder
    del content["callbacks"]["SameEncoders"]["autoencoder_used"]
    save_checkpoint(content, checkpoint)
    made_by(autoencoder="0" * 64, autoencoder_used=encoder)
    assert train(f"{resume} 2") == 0
    made_by(autoencoder=None)  # as far as is known
    assert train(f"{resume} 3") == 0


def test_a_run_without_loaded_weights_gets_a_warning(train, made_by, tmp_path, caplog):
    made_by(autoencoder="0" * 64)
    assert train("-l logs --max_steps 1") == 0
    assert "the set was made by another autoencoder" in caplog.text and "tools/hack_weights.py" in caplog.text


def test_weights_named_in_the_config_count_as_loaded(train, made_by, tmp_path):
    model = build_model(load_config([tmp_path / "tiny.yaml"]))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    made_by(autoencoder="0" * 64)
    error = train_error(train, f"-l logs --max_steps 1 model.params.ckpt_path={tmp_path / 'model.ckpt'}")
    assert "another autoencoder" in error


def test_a_model_with_a_text_encoder_ignores_the_text_tower(tmp_path, made_by):
    (tmp_path / "shards").mkdir()
    write_set(tmp_path / "shards", 2, shards=1)
    made_by(text_tower="0" * 64)
    callback = SameEncoders(is_loaded=True)
    callback.load_state_dict({"text_tower": "1" * 64})

    def start(key):
        dataset = ShardDataset(list((tmp_path / "shards").glob("*.tar")), cond_stage_key=key)
        datamodule = SimpleNamespace(datasets={"training": dataset})
        callback.on_fit_start(SimpleNamespace(datamodule=datamodule, callbacks=[callback]), None)

    start("txt")
    with pytest.raises(UserError, match=r"another text tower \(000000000000…\) than that of the checkpoint \(1111"):
        start("t5")
    made_by(text_tower="0" * 64, text_tower_used="2" * 64)  # SD 2, whose last block is not used
    callback.load_state_dict({"text_tower": "1" * 64, "text_tower_used": "2" * 64})
    start("t5")
    assert callback.state_dict()["text_tower_used"] == "2" * 64
    callback.load_state_dict({"text_tower": "0" * 64, "text_tower_used": "3" * 64})
    with pytest.raises(UserError, match=r"another text tower \(222222222222…\) than that of the checkpoint \(3333"):
        start("t5")


def train_error(train, line):
    """Return the error line of the run with `line`."""
    with pytest.raises(UserError) as caught:
        train(line)
    return str(caught.value)
