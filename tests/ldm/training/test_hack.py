"""What the hack does with files when something goes wrong; tests/tools has what it writes."""

import os

import pytest
import torch

from ldm.checkpoint import save_checkpoint, save_state_dict
from ldm.training import hack


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
