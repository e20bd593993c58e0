"""Tests of textual inversion through `main.py` on the demo's tiny model: hack, resume, merge."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_checkpoint, load_state_dict
from ldm.config.load import load_config
from ldm.release.configs import training_config
from ldm.release.hack import hack_config
from ldm.release.load import load_release
from ldm.release.merge import merge_files
from ldm.shards.writer import ShardWriter
from tests.conftest import RELEASE_CONFIG
from tests.golden_data import seeded_tensor
from tests.training_runs import fixture_one_thread, run_main, the_run  # noqa: F401

CONFIGS = [RELEASE_CONFIG, "textual_inversion.yaml"]
TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
TOM, PERSON = 2435, 2533  # CLIP's ids of "tom" and of the config's initial token
CAPTIONS = ["tom the cat, grinning", "tom the cat", "an image of tom", "the happy tom"]
TRAIN = (
    f"--base {' '.join(CONFIGS)} -t --no-test --scale_lr False model.base_learning_rate=0.01 "
    "model.params.cond_stage_config.params.token=tom "
    "data.params.training_urls=shard.tar data.params.batch_size=2 data.params.num_workers=0 "
    "lightning.callbacks.image_logger.params.disabled=True"
)


@pytest.fixture
def train(
    tmp_path: Path, tiny_release: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Callable[[str], dict]:
    """Return a function that trains with the given options, and returns the last checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_release, "release.safetensors")
    hack_config(training_config("release.safetensors", CONFIGS), Path("release.safetensors"), Path("start.ckpt"))
    params = load_config(CONFIGS).model.params
    with ShardWriter("shard.tar", len(CAPTIONS)) as writer:
        for index, caption in enumerate(CAPTIONS):
            posterior = io.BytesIO()
            shape = (2 * params.channels, params.image_size, params.image_size)
            np.save(posterior, seeded_tensor(caption, shape).numpy().astype(np.float16))
            writer.write(str(index), {"f8.npy": posterior.getvalue(), "txt": caption.encode()})

    def call(line: str) -> dict:
        run_main(monkeypatch, f"{TRAIN} {line}")
        return load_checkpoint(the_run(Path(line.split()[1])) / "checkpoints/last.ckpt")

    return call


def test_hack_train_merge(train: Callable[[str], dict]) -> None:
    trained = train("--logdir logs --resume start.ckpt --max_steps 3")
    assert trained["global_step"] == 3
    last = the_run(Path("logs")) / "checkpoints/last.ckpt"
    merge_files(last, Path("release.safetensors"), Path("mine.safetensors"), None, half=False)
    before, after = load_state_dict("release.safetensors"), load_state_dict("mine.safetensors")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [TABLE]
    assert (before[TABLE] != after[TABLE]).any(1).nonzero().flatten().tolist() == [TOM]
    # Three steps of AdamW from the initial token, each of at most the learning rate.
    assert 0 < (after[TABLE][TOM] - before[TABLE][PERSON]).abs().max() <= 0.0301
    optimizer = trained["optimizer_states"][0]["state"]
    assert [state["exp_avg"].shape for state in optimizer.values()] == [before[TABLE][TOM].shape]

    base, tuned = (load_release(path, RELEASE_CONFIG) for path in ("release.safetensors", "mine.safetensors"))
    with torch.no_grad():
        a_bear, a_tom = (
            [model.get_learned_conditioning([text]) for model in (base, tuned)] for text in ("a bear", "tom")
        )
    assert torch.equal(*a_bear)
    assert not torch.equal(*a_tom)


def test_a_resumed_run_equals_an_uninterrupted_one(train: Callable[[str], dict]) -> None:
    straight = train("--logdir straight --resume start.ckpt --max_steps 4")
    Path("prompts.txt").write_text("tom the cat --s 1")
    previews = "--previews prompts.txt lightning.previews.every_n_train_steps=3"
    train(f"--logdir stopped --resume start.ckpt --max_steps 3 {previews}")  # in the middle of the second epoch
    Path("release.safetensors").unlink()  # the model encodes the prompts itself, with the word's present embedding
    resumed = train(f"--logdir stopped --resume {the_run(Path('stopped'))} --max_steps 4")
    shown = [path.read_bytes() for path in sorted(the_run(Path("stopped")).glob("previews/01-tom-the-cat_gs-*.png"))]
    assert len(shown) == 2 and shown[0] != shown[1]
    assert resumed["global_step"] == 4
    for key, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    for name in ("exp_avg", "exp_avg_sq"):
        one, other = (run["optimizer_states"][0]["state"][0][name] for run in (straight, resumed))
        assert torch.equal(one, other)
