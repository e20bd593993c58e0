"""Tests of the command `tools/inspect_shards.py` on a bucketed set of a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.image_sources import find_images
from ldm.encoding.encoder import SampleEncoder
from ldm.encoding.preencode import preencode
from ldm.release.load import load_release
from ldm.shards.index import read_index, write_index
from tests.conftest import RELEASE_CONFIG, ROOT

TOOL = ROOT / "tools/inspect_shards.py"


@pytest.fixture(scope="module")
def encoded(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-encode five images of two aspect ratios; return the folder of the set."""
    work = tmp_path_factory.mktemp("encoded")
    folder = work / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate([(80, 80)] * 3 + [(50, 200)] * 2):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    encoder = SampleEncoder(load_release(tiny_release, RELEASE_CONFIG))
    preencode(encoder, find_images(folder, "a cat"), str(work / "set/s-%d.tar"), size=128, buckets=True)
    return work / "set"


@pytest.fixture
def shards(encoded: Path, tmp_path: Path) -> str:
    """Copy the set to where a test can change it; return the pattern of the shards."""
    shutil.copytree(encoded, tmp_path / "set")
    return str(tmp_path / "set/*.tar")


@pytest.fixture
def inspect(run_tool: Callable) -> Callable[..., str | None]:
    """Return a function that runs the command in this process, and returns None or the error line."""
    return partial(run_tool, TOOL)


def test_text_json_and_sheet(inspect, shards, tiny_release, tmp_path, caplog):
    caplog.set_level("INFO")
    written = ("--json", tmp_path / "found.json", "--sheet", tmp_path / "sheet.png")
    assert inspect(shards, *written, "--ckpt", tiny_release, "--config", RELEASE_CONFIG, "--samples", 4) is None
    model = load_release(tiny_release, RELEASE_CONFIG)
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found["shapes"].values()) == [2, 3] and found["duplicates"]["captions"][0]["samples"] == 5
    assert len(found["latents"]["channel_std"]) == model.channels
    assert found["latents"]["expected_std"] == pytest.approx(1 / model.scale_factor)
    assert "5 samples in 1 shard, " in caplog.text and "another autoencoder" not in caplog.text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 4 * 192 and len(sheet.getcolors(1 << 24)) > 1000  # four images in a row


def test_without_a_model(inspect, shards, tmp_path, caplog):
    caplog.set_level("INFO")
    assert inspect(shards) is None
    assert "the model expects a std of" in caplog.text  # from the set's index


def test_another_autoencoder_gives_a_warning(inspect, shards, tiny_release, tmp_path, caplog):
    other = {"autoencoder": "0" * 64, "autoencoder_used": "0" * 64}
    write_index(tmp_path / "set", {**read_index(tmp_path / "set"), **other})
    assert inspect(shards, "--ckpt", tiny_release, "--config", RELEASE_CONFIG) is None
    assert f"the set was made by another autoencoder (000000000000…) than that of {tiny_release} (" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale_factor", "abc"), ("scale_factor", {}), ("failed", "abc"), ("failed", {"a": 1}), ("failed", ["x"])],
)
def test_a_wrong_value_in_the_index_is_refused_in_one_line(inspect, shards, tmp_path, key, value):
    write_index(tmp_path / "set", {**read_index(tmp_path / "set"), key: value})
    error = inspect(shards)
    assert f"index.json: {key} is {value!r}, not a " in error and "\n" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sheet", "x.png"), "--sheet x.png: needs an autoencoder"),
        (("--config", "x.yaml"), "--config x.yaml: give its release too, with --ckpt"),
        (("--sheet", "x", "--ckpt", "c", "--config", "d"), "--sheet x: the name must end in .png"),
        (("--samples", 0), "--samples 0"),
        ((), "nowhere.tar: no such file"),
    ],
)
def test_bad_input_is_refused_in_one_line(inspect, words, message):
    error = inspect("nowhere.tar", *words)
    assert error.startswith("error: ") and message in error and "\n" not in error
