"""Tests of building a model with the weights of a training checkpoint, and of checkpoint files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import load_checkpoint, save_checkpoint
from ldm.config.load import build_model
from ldm.release.initial_checkpoint import checkpoint_at_start
from ldm.training.resume import AtomicCheckpointIO, build_from, read_training_checkpoint
from ldm.util import UserError
from tests.training_runs import CONFIG


@pytest.fixture
def config() -> DictConfig:
    return OmegaConf.create(CONFIG)


def save(config: DictConfig, path: Path, left_out: str = "nothing") -> dict[str, torch.Tensor]:
    """Save a checkpoint of a new model, without keys that begin with `left_out`; return the weights."""
    torch.manual_seed(1)
    weights = {key: value for key, value in build_model(config).state_dict().items() if not key.startswith(left_out)}
    save_checkpoint(checkpoint_at_start(weights), path)
    return weights


def test_build_from_loads_the_checkpoints_weights(config: DictConfig, tmp_path: Path) -> None:
    expected = save(config, tmp_path / "last.ckpt")
    checkpoint = read_training_checkpoint(tmp_path / "last.ckpt")
    model = build_from(config, checkpoint)
    assert all(value.equal(expected[key]) for key, value in model.state_dict().items())
    (tmp_path / "last.ckpt").write_bytes(b"")  # the model's weights do not share memory with the file
    assert all(value.equal(expected[key]) for key, value in model.state_dict().items())


def test_lightning_loads_the_models_own_tensors(config: DictConfig, tmp_path: Path) -> None:
    save(config, tmp_path / "last.ckpt", left_out="model_ema.")
    checkpoint = read_training_checkpoint(tmp_path / "last.ckpt")
    model = build_from(config, checkpoint)
    io = AtomicCheckpointIO(tmp_path, checkpoint)
    given = io.load_checkpoint(tmp_path / "last.ckpt")
    assert given["global_step"] == 0
    own = model.state_dict()
    assert given["state_dict"].keys() == {key for key in own if not key.startswith("model_ema.")}
    assert all(value.data_ptr() == own[key].data_ptr() for key, value in given["state_dict"].items())
    again = io.load_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert all(value.data_ptr() != own[key].data_ptr() for key, value in again.items())


def test_another_path_is_read(config: DictConfig, tmp_path: Path) -> None:
    for name in ("one.ckpt", "other.ckpt"):
        save(config, tmp_path / name)
    io = AtomicCheckpointIO(tmp_path, read_training_checkpoint(tmp_path / "one.ckpt"))
    (tmp_path / "one.ckpt").unlink()
    assert io.load_checkpoint(tmp_path / "other.ckpt")["global_step"] == 0


def test_a_missing_average_starts_from_the_weights(config: DictConfig, tmp_path: Path) -> None:
    save(config, tmp_path / "last.ckpt", left_out="model_ema.")
    model = build_from(config, read_training_checkpoint(tmp_path / "last.ckpt"))
    for path, name in model.model_ema.m_name2s_name.items():
        assert model.model_ema.get_buffer(name).equal(model.model.get_parameter(path))


def test_missing_optional_parameters_start_as_in_a_new_model(tmp_path: Path) -> None:
    autoencoder = CONFIG["model"]["params"]["first_stage_config"]
    loss = {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 3}}
    params = {**autoencoder["params"], "lossconfig": loss}
    config = OmegaConf.create({"model": {"target": autoencoder["target"], "params": params}})
    weights = save(config, tmp_path / "last.ckpt", left_out="loss.")
    torch.manual_seed(2)
    model = build_from(config, read_training_checkpoint(tmp_path / "last.ckpt"))
    torch.manual_seed(2)
    new = build_model(config)
    assert model.loss.weight.equal(new.loss.weight)
    assert model.encoder.conv_in.weight.equal(weights["encoder.conv_in.weight"])


def test_atomic_checkpoint_io_writes_and_removes_in_the_run_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run / "checkpoints", outside):
        folder.mkdir(parents=True)
    io, content = AtomicCheckpointIO(run), {"state_dict": {}}
    (run / "link").symlink_to(outside)
    for path in (outside / "a.ckpt", run / ".." / "outside" / "a.ckpt", run / "link" / "a.ckpt"):
        with pytest.raises(UserError, match="lies outside"):
            io.save_checkpoint(content, path)
        assert list(outside.iterdir()) == []
        (outside / "a.ckpt").touch()
        io.remove_checkpoint(path)
        assert (outside / "a.ckpt").exists() and "Not removed: " in caplog.text
        (outside / "a.ckpt").unlink()
    io.save_checkpoint(content, run / "checkpoints" / "a.ckpt")
    for name in ("last.ckpt", "notes.txt", "b.ckpt"):
        (run / "checkpoints" / name).touch()
    (outside / "linked.ckpt").touch()
    (run / "checkpoints" / "linked.ckpt").symlink_to(outside / "linked.ckpt")
    for name in ("a.ckpt", "last.ckpt", "notes.txt", "linked.ckpt", "missing.ckpt"):
        io.remove_checkpoint(run / "checkpoints" / name)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "notes.txt", "b.ckpt"}
    assert (outside / "linked.ckpt").exists()


def test_build_from_refuses_a_checkpoint_that_predicts_something_else(config: DictConfig, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(config, path)
    content = load_checkpoint(path)
    save_checkpoint({**content, "parameterization": "v"}, path)
    with pytest.raises(UserError, match=r"last\.ckpt: its UNet predicts v, the config's .* is eps") as caught:
        build_from(config, read_training_checkpoint(path))
    assert "\n" not in str(caught.value) and "model.params.parameterization=v" in str(caught.value)
    config.model.params.parameterization = "v"
    assert build_from(config, read_training_checkpoint(path)).parameterization == "v"
    save_checkpoint({**content, "parameterization": 7}, path)
    with pytest.raises(UserError, match="parameterization: none of eps, x0, v"):
        read_training_checkpoint(path)
