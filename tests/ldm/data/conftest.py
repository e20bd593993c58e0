from pathlib import Path

import pytest
from shard_files import write_set


@pytest.fixture
def shard_set(tmp_path: Path) -> str:
    """Ten samples in two shards."""
    return write_set(tmp_path / "shards", 10)
