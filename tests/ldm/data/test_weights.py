"""Weights of samples from the config and from the folders that were pre-encoded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.data.datamodule import WebDataNpyModuleFromConfig
from ldm.data.weights import sample_weights
from ldm.shards.index import INDEX
from ldm.shards.reader import ShardDataset
from ldm.shards.urls import expand_urls, shard_weights, without_weights
from ldm.util import UserError
from tests.training_runs import write_index, write_inputs


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path / "shards"


def note_repeats(shards: Path, runs: Any) -> None:
    write_index(shards)
    index = json.loads((shards / INDEX).read_text())
    index["shards"][0]["repeats"] = runs
    (shards / INDEX).write_text(json.dumps(index))


def test_shard_weights_and_names(shards: Path) -> None:
    first, second = (f"{shards}/s-00000{number}.tar" for number in range(2))
    given = [second, {"urls": [f"{shards}/s-*0.tar"], "weight": 3}]
    assert shard_weights(given) == {second: 1.0, first: 3.0}
    assert expand_urls(without_weights(given)) == [second, first]
    assert without_weights("a") == "a" and without_weights({"urls": "a"}) == without_weights([{"urls": "a"}]) == ["a"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"urls": "s-000001.tar", "weigth": 2}, "unknown key 'weigth' in an entry of training_urls; did you mean"),
        ({"weight": 2}, "names no shards; give urls: a/.*, and weight: 3"),
        ({"urls": "s-000001.tar", "weight": 0}, "training_urls: weight 0: give a number"),
        ({"urls": "s-000001.tar", "weight": "3"}, "training_urls: weight '3': give a number"),
        ({"urls": "s-000000.tar", "weight": 2}, r"s-000000.tar: occurs twice among the shards"),
        (["s-000001.tar"], "give a path, a pattern or a list of these"),
    ],
)
def test_wrong_weights_are_refused(entry: Any, message: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    with pytest.raises(UserError, match=message):
        WebDataNpyModuleFromConfig(2, ["s-000000.tar", entry])


def test_weights_of_streams_and_of_other_sets_are_refused(shards: Path) -> None:
    stream = WebDataNpyModuleFromConfig(2, [{"urls": f"pipe:cat {shards}/s-000000.tar", "weight": 2}])
    with pytest.raises(UserError, match="a weight needs local shards, but pipe:cat"):
        stream.setup("fit")
    held_out = WebDataNpyModuleFromConfig(2, str(shards), val_urls=[{"urls": str(shards), "weight": 2}])
    with pytest.raises(UserError, match="give a path, a pattern or a list of these"):
        held_out.setup("fit")


def test_folder_repeats_multiply_the_weights(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    note_repeats(shards, [[10, 2], [1, 4]])
    dataset = ShardDataset(sorted(shards.glob("*.tar")))
    second = str(dataset.paths[1])
    assert sample_weights(dataset, {}, True).tolist() == [10, 10, *[1] * 10]
    assert "samples 10 of weight 1, 2 of weight 10; about 30 per epoch" in caplog.text
    assert sample_weights(dataset, {second: 0.5}, True).tolist() == [10, 10, *[1] * 4, *[0.5] * 6]
    assert sample_weights(dataset, {}, False) is None
    data = WebDataNpyModuleFromConfig(2, str(shards))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 15
    names = [name for batch in batches for name in batch["stream"]]
    assert len(set(names)) == 30 and np.unique([key for batch in batches for key in batch["__key__"]]).size == 12


@pytest.mark.parametrize(
    ("runs", "message"),
    [([[10, 2]], "has repeats for 2 samples of s-000000.tar, which holds 6"), ([[0, 6]], "repeats is .*not pairs")],
)
def test_wrong_repeats_in_an_index_are_refused(runs: Any, message: str, shards: Path) -> None:
    note_repeats(shards, runs)
    with pytest.raises(UserError, match=message):
        sample_weights(ShardDataset(sorted(shards.glob("*.tar"))), {}, True)
