from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.reporting.training_sets import Contents, SampleLimits, read_contents, read_training_sets
from tests.training_runs import SAMPLES, write_inputs


def config_of(**params: object) -> dict:
    return {"data": {"params": {"batch_size": 1, **params}}}


def test_read_training_sets_counts_by_the_index(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 1000)
    failed = [{"name": "x.png", "reason": "x.png: truncated"}]
    shard = {"name": "a.tar", "samples": 12, "bytes": 1000, "sha256": "ab"}
    index = {"format": 2, "shards": [shard], "family": "sd1", "complete": False, "failed": failed}
    (tmp_path / "index.json").write_text(json.dumps(index))
    [found] = read_training_sets(config_of(training_urls=f"{tmp_path}/*.tar", val_urls=None), [])
    assert (found.name, found.shards, found.samples, found.size) == ("training", 1, 12, 1000)
    assert (found.family, found.failed, found.complete) == ("sd1", ["x.png: truncated"], False)


def test_read_training_sets_lists_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    (tmp_path / "index.json").write_text("{")
    problems: list[str] = []
    config = config_of(training_urls=f"{tmp_path}/none-0.tar", val_urls=f"{tmp_path}/a.tar", test_urls="pipe:cat x.tar")
    [found] = read_training_sets(config, problems)
    assert (found.name, found.samples) == ("test", None)
    assert [problem.split(":")[0] for problem in problems] == ["data.params.training_urls", "data.params.val_urls"]


class Decoder(nn.Module):
    """Autoencoder that repeats each value of a latent 2 × 2 times."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(("limits", "shown"), [
    (SampleLimits(3), 3),
    (SampleLimits(3, memory=64 * 4096), 3),  # 8 × 8 pixels
    (SampleLimits(3, memory=63 * 4096), 0),
    (SampleLimits(3, seconds=0.0), 0),
])  # fmt: skip
def test_read_contents_keeps_its_limits(tmp_path: Path, limits: SampleLimits, shown: int) -> None:
    write_inputs(tmp_path)
    found = Contents([], [])
    read_contents(found, str(tmp_path / "shards/*.tar"), Decoder(), limits)
    assert [(image.width, image.height) for image in found.images] == [(8, 8)] * shown
    assert found.lines[0].startswith("Captions: median")
    assert any("No samples are shown" in line for line in found.lines) == (not shown)


def test_read_contents_of_a_large_set_counts_no_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.reporting.training_sets._MOST_INSPECTED", SAMPLES - 1)
    write_inputs(tmp_path)
    found = Contents([], [])
    read_contents(found, str(tmp_path / "shards/*.tar"), None, SampleLimits(3))
    assert [line[:24] for line in found.lines] == ["Captions are not counted"]
