"""Runs of main.py on a tiny model and tiny data, and comparisons of runs."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_state_dict
from ldm.config.load import build_model
from ldm.shards.index import INDEX
from ldm.shards.verify import file_sha256
from tests.golden_data import fill_seeded

SAMPLES = 12
# Options for noise in training that differs from plain noise in each way.
NOISE = "model.params.noise_config.target=ldm.models.diffusion.noise.TrainingNoise " + " ".join(
    f"model.params.noise_config.params.{setting}" for setting in ("offset=0.1", "pyramid=0.3", "perturbation=0.1")
)
CONFIG = {
    "model": {
        "base_learning_rate": 1e-3,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "timesteps": 50,
            "log_every_t": 25,
            "first_stage_key": "f8",
            "cond_stage_key": "t5",
            "conditioning_key": "crossattn",
            "image_size": 4,
            "channels": 4,
            "monitor": "val/loss_simple_ema",
            "scale_factor": 0.18215,
            "use_ema": True,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 4,
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": 32,
                    "attention_resolutions": [1],
                    "num_res_blocks": 1,
                    "channel_mult": [1],
                    "num_heads": 2,
                    "use_spatial_transformer": True,
                    "context_dim": 8,
                    "legacy": False,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 8,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 32,
                        "ch_mult": [1, 1],
                        "num_res_blocks": 1,
                        "attn_resolutions": [],
                        "dropout": 0.0,
                    },
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.DummyEncoder", "params": {"key": "t5"}},
        },
    },
    "data": {
        "target": "main.WebDataNpyModuleFromConfig",
        "params": {
            "batch_size": 2,
            "num_workers": 0,
            "null_cond_dropout": 0.2,
            "training_urls": "shards/s-{000000..000001}.tar",
        },
    },
    "lightning": {
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
        "report": False,  # its figures take longer than the training
        "trainer": {"log_every_n_steps": 1, "enable_model_summary": False},
    },
}
# In place of the stored encodings: a text tower as narrow as they are.
TEXT_TOWER = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "text_config": {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 8,
        }
    },
}


def write_inputs(folder: Path) -> None:
    """Write `tiny.yaml` and `shards/` into `folder`."""
    OmegaConf.save(OmegaConf.create(CONFIG), folder / "tiny.yaml")
    rng = np.random.default_rng(0)
    shards = folder / "shards"
    shards.mkdir()
    np.save(shards / "null.t5.npy", np.ones((77, 8), np.float16))
    for shard in range(2):
        with tarfile.open(shards / f"s-{shard:06}.tar", "w") as tar:
            for sample in range(SAMPLES // 2):
                posterior = rng.standard_normal((8, 4, 4)).astype(np.float16)
                text = rng.standard_normal((77, 8)).astype(np.float16)
                for name, array in (("f8", posterior), ("t5", text)):
                    buffer = io.BytesIO()
                    np.save(buffer, array)
                    member = tarfile.TarInfo(f"{shard}{sample:03}.{name}.npy")
                    member.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(member, buffer)


def write_index(shards: Path, **digests: str | None) -> None:
    """Write an index of the tars in `shards`, with the digests of the weights that made them."""
    paths = sorted(shards.glob("*.tar"))
    listed = [{"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths]
    (shards / INDEX).write_text(json.dumps({"format": 2, "complete": True, "shards": listed, **digests}))


def write_release(folder: Path) -> Path:
    """Write `release.yaml` and `release.safetensors`, a release of the tiny model, and return the latter's path."""
    config = OmegaConf.create({"model": CONFIG["model"]})
    config.model.params.cond_stage_config = TEXT_TOWER
    config.model.params |= {"first_stage_key": "image", "cond_stage_key": "txt"}
    OmegaConf.save(config, folder / "release.yaml")
    save_state_dict(fill_seeded(build_model(config)).state_dict(), folder / "release.safetensors")
    return folder / "release.safetensors"


def run_main(monkeypatch: pytest.MonkeyPatch, line: str | list[str]) -> None:
    """Run `python main.py` with the words of `line`, a text or a list, in this process."""
    import main

    words = line.split() if isinstance(line, str) else line
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that the run's own value goes away with the test
    main.main()


def the_run(logs: Path) -> Path:
    """Return the only run folder under `logs`."""
    (run,) = logs.iterdir()
    return run


def logged(run: Path, key: str) -> dict[int, str]:
    """Return the values of `key` by step, from the CSV files of all starts of `run`."""
    values = {}
    for path in sorted(run.glob("csv/*/metrics.csv")):
        with path.open() as file:
            values |= {int(row["step"]): row[key] for row in csv.DictReader(file) if row.get(key)}
    return values


def state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint."""
    return torch.load(path, weights_only=True)


def assert_same_training(straight: Path, resumed: Path) -> None:
    """Assert equal losses at each step, and equal weights, averages, optimizer state and counts, bit for bit."""
    losses = logged(straight, "train/loss")
    assert losses and losses == logged(resumed, "train/loss")
    one, other = (state(run / "checkpoints" / "last.ckpt") for run in (straight, resumed))
    assert one["global_step"] == other["global_step"]
    loops, others = (checkpoint["loops"]["fit_loop"] for checkpoint in (one, other))
    for counts in ("epoch_progress", "epoch_loop.batch_progress", "state_dict"):  # the last: where the data are
        assert loops[counts] == others[counts]
    assert [key for key, value in one["state_dict"].items() if not value.equal(other["state_dict"][key])] == []
    moments, same = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other))
    assert_equal(moments, same)


def assert_equal(one: Any, other: Any) -> None:
    """Assert that nested values are equal: tensors bit for bit, dicts in their keys."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one.equal(other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(name="one_thread")
def fixture_one_thread() -> Iterator[None]:
    """Use one thread, because more threads slow down a model of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="train")
def fixture_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Callable[[str | list[str]], int]:
    """Return a function that trains in this process, on `tiny.yaml` unless it resumes. It returns the exit code."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(line: str | list[str]) -> int:
        words = line.split() if isinstance(line, str) else line
        base = [] if "--resume" in words else ["-b", "tiny.yaml"]
        try:
            run_main(monkeypatch, [*base, "-t", "--no-test", *words])
        except SystemExit as stop:
            return stop.code
        return 0

    return call
