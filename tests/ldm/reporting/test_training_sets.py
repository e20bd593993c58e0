from __future__ import annotations

import json
from pathlib import Path

from ldm.reporting.training_sets import read_training_sets


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
