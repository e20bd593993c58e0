"""Training of the text encoder on several captions per image, by tier, with previews."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.modules.encoders.clip_text import FrozenCLIPEmbedder
from ldm.shards import npy
from tests.ldm.shard_files import write_tar
from tests.test_several_processes import Runs
from tests.test_trained_parts import STREAMED, write_captioned
from tests.training_runs import (  # noqa: F401
    assert_same_training,
    fixture_one_thread,
    fixture_train,
    state,
    the_run,
)

CAPTIONS = ("cat", "a red dog", "bird")
PREVIEWS = "--previews prompts.txt lightning.previews.every_n_train_steps=1"


def write_several(folder: Path) -> None:
    """Write `captions.yaml` and a shard of 12 images with three captions each, beside its index."""
    write_captioned(folder)
    random, members = np.random.default_rng(0), []
    for number in range(12):
        latent = random.standard_normal((8, 4, 4)).astype(np.float16)
        captions = "\n".join(f"{caption} {number}" for caption in CAPTIONS)
        members += [(f"{number:02}.f8.npy", npy.encode(latent)), (f"{number:02}.txt", captions.encode())]
    write_tar(folder / "captioned.tar", members)
    index = {"format": 1, "shards": [{"name": "captioned.tar"}], "members": ["f8"], "several_captions": True}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "options",
    ["smallest.yaml data.params.batch_size=2", f"{STREAMED} model.params.unet_config.params.stream_dtype=bf16"],
    ids=["smallest", "minimal"],
)
def test_a_resumed_run_with_previews_equals_an_uninterrupted_one(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    write_several(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat --s 2\n")
    read: list[str] = []
    forward = FrozenCLIPEmbedder.forward
    monkeypatch.setattr(FrozenCLIPEmbedder, "forward", lambda self, texts: read.extend(texts) or forward(self, texts))
    line = f"-b captions.yaml {options}"
    train(f"{line} -l straight --max_steps 4")
    found = {text.rstrip(" 0123456789") for text in read} - {""}
    assert len(found) > 1 and found <= {*CAPTIONS}, "one caption at a time, and not always the first"
    train(f"{line} -l resumed --max_steps 2 {PREVIEWS}")
    run = the_run(tmp_path / "resumed")
    before = state(run / "checkpoints/last.ckpt")["state_dict"]
    train(f"--resume {run} --max_steps 4")
    assert_same_training(the_run(tmp_path / "straight"), run)
    after = state(run / "checkpoints/last.ckpt")["state_dict"]
    assert any(not after[key].equal(before[key]) for key in after if key.startswith("cond_stage_model."))
    images = sorted((run / "previews").glob("01-*_gs-*.png"))
    assert len(images) == 5 and not (run / "previews/prompts.safetensors").exists()
    pixels = []
    for path in (images[0], images[-1]):
        with Image.open(path) as image:
            pixels.append(image.tobytes())
    assert pixels[0] != pixels[1]


def test_two_processes_choose_the_captions_of_one(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    write_several(tmp_path)
    (tmp_path / "captions.yaml").rename(tmp_path / "tiny.yaml")
    runs("one", "data.params.batch_size=4")
    runs("two", "data.params.batch_size=2", ranks=2)
    assert runs.losses("two") == pytest.approx(runs.losses("one"), rel=1e-4)
