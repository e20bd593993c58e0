"""What the hack does with files when something goes wrong; tests/tools has what it writes."""

import hashlib
import os

import pytest
import torch

from ldm.checkpoint import load_checkpoint, save_checkpoint, save_state_dict, weights_digest
from ldm.release import hack
from ldm.util import UserError


@pytest.fixture
def files(tmp_path):
    """A training checkpoint and a release."""
    content = {"global_step": 5, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    save_checkpoint({"state_dict": {"model.w": torch.zeros(3)}, **content}, tmp_path / "last.ckpt")
    save_state_dict({"model.w": torch.ones(3)}, tmp_path / "model.ckpt")
    return tmp_path / "last.ckpt", tmp_path / "model.ckpt"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_write_leaves_everything_as_it_was(error, files, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise error

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(hack, "save_checkpoint", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)):
        hack.hack_training(*files, files[0])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupt_after_the_replacement_keeps_the_old_file(files, tmp_path, monkeypatch):
    def replaced_then_interrupted(content, path, **_):
        save_checkpoint({}, path)
        raise KeyboardInterrupt

    before = files[0].read_bytes()
    monkeypatch.setattr(hack, "save_checkpoint", replaced_then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        hack.hack_training(*files, files[0])
    assert (tmp_path / "last.before-hack.ckpt").read_bytes() == before


def test_the_old_file_is_copied_where_there_are_no_links(files, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    before = files[0].read_bytes()
    monkeypatch.setattr(os, "link", no_links)
    hack.hack_training(*files, files[0])
    assert (tmp_path / "last.before-hack.ckpt").read_bytes() == before
    assert files[0].read_bytes() != before


def test_only_a_training_that_has_begun_is_kept(files, tmp_path):
    def on_disk():
        return sorted(path.name for path in tmp_path.glob("last*"))

    start = {"global_step": 0, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    save_checkpoint({"state_dict": {"model.w": torch.zeros(3)}, **start}, files[0])
    for _ in range(2):
        hack.hack_training(*files, files[0])
    assert on_disk() == ["last.ckpt"]
    optimizer = {"state": {}, "param_groups": []}
    save_checkpoint({"state_dict": {"model.w": torch.zeros(3)}, **start, "optimizer_states": [optimizer]}, files[0])
    hack.hack_training(*files, files[0])
    assert on_disk() == ["last.before-hack.ckpt", "last.ckpt"]
    files[0].write_bytes(b"something else")
    with pytest.raises(UserError):
        hack.hack_training(*files, files[0])
    assert files[0].read_bytes() == b"something else"


def test_the_encoders_leave_their_digests(files):
    """The text tower is left out, and the training may keep the autoencoder rounded."""
    text = {"cond_stage_model.w": torch.full((2,), 0.1)}
    save_state_dict({"model.w": torch.ones(3), **text}, files[1])
    hack.hack_training(*files, files[0])
    state = load_checkpoint(files[0])["callbacks"]["SameEncoders"]
    assert state == {"text_tower": weights_digest(text, "cond_stage_model."), "autoencoder": None}


def test_hack_training_notes_name_and_checksum_of_the_release(files):
    hack.hack_training(*files, files[0])
    digest = hashlib.sha256(files[1].read_bytes()).hexdigest()
    assert load_checkpoint(files[0])["release"] == {"name": str(files[1]), "sha256": digest}


def test_a_training_checkpoint_is_no_release(files, tmp_path):
    (tmp_path / "other.ckpt").write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match=r"other\.ckpt: a training checkpoint .*merge_release"):
        hack.hack_training(files[0], tmp_path / "other.ckpt", files[0])


def test_hack_training_notes_what_the_release_predicts(files):
    save_state_dict({"model.w": torch.ones(3), "v_pred": torch.zeros(0)}, files[1])
    hack.hack_training(*files, files[0])
    assert load_checkpoint(files[0])["parameterization"] == "v"


def test_hack_training_refuses_a_release_that_predicts_something_else(files):
    content = load_checkpoint(files[0])
    save_checkpoint({**content, "parameterization": "eps"}, files[0])
    save_state_dict({"model.w": torch.ones(3), "v_pred": torch.zeros(0)}, files[1])
    before = files[0].read_bytes()
    with pytest.raises(UserError, match="predicts v, but the training's parameterization is eps; train with"):
        hack.hack_training(*files, files[0])
    assert files[0].read_bytes() == before
    hack.hack_training(*files, files[0], parameterization="eps")
    assert load_checkpoint(files[0])["parameterization"] == "eps"


def test_a_release_of_another_noise_schedule_is_refused(files):
    save_state_dict({"model.w": torch.ones(3), "edm_mean": torch.zeros(1)}, files[1])
    with pytest.raises(UserError, match=r"model\.ckpt: holds edm_mean"):
        hack.hack_training(*files, files[0])
